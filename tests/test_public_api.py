import subprocess
import sys

import pytest

import ckptkit


def test_every_public_name_resolves():
    for name in ckptkit.__all__:
        assert getattr(ckptkit, name) is not None
    assert set(ckptkit.__all__) <= set(dir(ckptkit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = ckptkit.convrt


def test_importing_the_package_loads_nothing_else():
    code = "import sys, ckptkit; print([name for name in sys.modules if name.startswith('ckptkit.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ckptkit.version']"
