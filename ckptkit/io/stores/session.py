"""botocore's session and client for S3: credentials, region and endpoint are those that the AWS tools use."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

_CONNECT, _ANSWER = 10.0, 60.0
"""Seconds until a connection stands, and between two pieces of an answer."""
ATTEMPTS = 6
"""Attempts of one call; botocore waits longer between each two, up to 20 s."""
_CONNECTIONS = 32
_REGION = "us-east-1"
"""What stores that know no regions want to hear."""


def session_and_client() -> tuple[Any, Any]:
    """A session and a client, as the user configured botocore; only the bounds are ours.

    Raises:
        ImportError: botocore is not installed.
        BotoCoreError: The configuration cannot be read.
        ValueError: The configuration names no store.
    """
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    theirs = os.environ.get("AWS_MAX_ATTEMPTS") or os.environ.get("AWS_RETRY_MODE")
    config = Config(
        connect_timeout=_CONNECT,
        read_timeout=_ANSWER,
        max_pool_connections=_CONNECTIONS,
        retries=None if theirs else {"total_max_attempts": ATTEMPTS, "mode": "standard"},
        tcp_keepalive=True,
        # Parts carry their MD5, which every store knows; newer checksums are not for all of them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # As the AWS command line has it; botocore by itself reads AWS_DEFAULT_REGION and profiles.
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or _REGION
    return session, session.create_client("s3", region_name=region, config=config)


@cache
def _loader() -> Any:
    """What botocore knows of S3 is a megabyte of JSON, read once for all clients of a process."""
    from botocore.loaders import create_loader

    return create_loader()
