"""What loraplex is compared with, and what all contenders are given and give back."""
