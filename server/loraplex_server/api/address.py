"""Addresses as gRPC takes them and people read them."""

from __future__ import annotations


def address(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
