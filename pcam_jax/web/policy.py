"""The content security policy: nothing from elsewhere, and no script or style but the pages' own, told by digest."""

from __future__ import annotations

import base64
import hashlib
import re


def content_security_policy(*pages: str) -> str:
    """The policy for these pages, whose scripts and styles stand inside them."""

    def digests(tag: str) -> str:
        bodies = sorted(
            {body for page in pages for body in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)}
        )
        hashed = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in hashed) or "'none'"

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {digests('script')}",
            f"style-src {digests('style')}",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
