"""Both methods are registered with PEFT whatever is imported first, and PEFT is not imported before it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback

import pytest
import torch  # noqa: F401
import transformers  # noqa: F401

REGISTERED = "assert {'LORETTA_ADP', 'LORETTA_REP'} <= set(peft.PEFT_TYPE_TO_TUNER_MAPPING)"
ORDERS = {
    "loretta-first": "import loretta, peft",
    "peft-first": "import peft, loretta",
    "a-module-that-imports-peft": "import loretta.config, peft",
    "one-that-does-not-and-then-peft": "import loretta.targets, peft",
    "a-name-of-the-package": "from loretta import LorettaRepConfig; import peft; LorettaRepConfig()",
    "every-name-of-the-package": "from loretta import *; import peft; LorettaAdpConfig, TaskType, compress_lora",
    "after-an-import-that-failed": """
import sys, loretta
sys.modules["safetensors"] = None
try:
    import peft
    raise SystemExit("peft needs no safetensors")
except ImportError:
    del sys.modules["safetensors"]
import peft""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork: a new process would import torch for each order")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_registers(order) -> None:
    child = os.fork()
    if child == 0:
        for name in [name for name in sys.modules if name.split(".")[0] in ("loretta", "peft")]:
            del sys.modules[name]
        try:
            exec(f"{order}\n{REGISTERED}", {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_importing_the_package_alone_imports_no_library() -> None:
    code = "import loretta, sys; assert not {'peft', 'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    import loretta

    with pytest.raises(AttributeError, match="module 'loretta' has no attribute 'nothing'"):
        loretta.nothing  # noqa: B018
    assert set(loretta.__all__) <= set(dir(loretta))
