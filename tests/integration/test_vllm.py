"""The same application with `engine: vllm`, in an environment that has it.

vLLM wants other versions of some packages, so it has an environment of its own (`make vllm`), and the tests of the
interface and of the engine run a second time there, against a cluster of that environment.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

VENV = Path(os.environ.get("RAYLOOP_VLLM_VENV", ROOT / ".rayloop" / "vllm-venv"))


@pytest.mark.slow
@pytest.mark.timeout(1_500)
@pytest.mark.parametrize(
    "tests", ["unit/test_vllm_engine.py", "integration/test_openai_api.py", "integration/test_serve.py"]
)
def test_vllm_passes_the_tests_of_the_engine_and_of_the_application(tests: str) -> None:
    if not (VENV / "installed").is_file():
        pytest.skip(f"vLLM's CPU build is not in {VENV}: make vllm")
    command = [VENV / "bin" / "python", "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "--timeout", "300", ROOT / "tests" / tests],
        cwd=ROOT, env={**os.environ, "RAYLOOP_TEST_ENGINE": "vllm"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-10_000:]
    assert " passed" in run.stdout
