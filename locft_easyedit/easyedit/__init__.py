"""The bridge to EasyEdit: finding, importing and extending it. Nothing else imports it."""

from __future__ import annotations

from .registration import editor_class, register, unregister

__all__ = ["editor_class", "register", "unregister"]
