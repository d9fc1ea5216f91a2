"""The systems that loraplex is compared with, and loraplex's own engine as one of them."""
