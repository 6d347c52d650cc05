"""Exit with status 0 if the server in this container is ready for requests, else 1."""

import os
import sys
import urllib.request


def is_ready(port: str) -> bool:
    """Request `/health/ready` over loopback, without a proxy of the environment."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health/ready", timeout=4) as answer:
            return bool(answer.status == 200)
    except OSError as error:
        print(error, file=sys.stderr)
        return False


if __name__ == "__main__":
    sys.exit(0 if is_ready(os.environ.get("PROMPTPLEX_PORT", "8000")) else 1)
