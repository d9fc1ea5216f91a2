"""Adapters from elsewhere: object stores, the Hugging Face hub and web servers, through one downloader."""

from __future__ import annotations
