"""How soon commands start."""

import subprocess
import sys


def test_small_commands_wait_for_no_large_library() -> None:
    code = "import sys, app.cli; print({'torch', 'transformers', 'peft'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
