"""Text that streams is not interrupted by advice that does not hold on the device."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from makeready.engines.transformers.advice import without_kernel_advice

ADVICE = "`causal_conv1d_fn` is falling back to its reference PyTorch implementation because it is not installed"


@pytest.mark.parametrize(("holds", "heard"), [(False, ["else"]), (True, [ADVICE, "else"])])
def test_advice_that_does_not_hold_is_kept_back_and_nothing_else(holds, heard):
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    speaker = logging.getLogger("transformers.integrations.hub_kernels")
    speaker.addHandler(listener)
    try:
        with without_kernel_advice(holds=holds):
            speaker.warning(ADVICE)
            speaker.warning("else")
    finally:
        speaker.removeHandler(listener)
    assert said == heard


def test_the_guide_s_engine_streams_text_alone():
    code = (
        "from makeready import prepare\n"
        "from makeready.engines.transformers.launching import open_engine\n"
        "engine = open_engine(prepare(platform='cpu', backend='reference'))\n"
        "print(''.join(output.text for output in engine.stream('The import statement')))\n"
        "engine.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert "falling back" not in done.stderr
