"""What meswitch uses of vLLM is there; what moved is named."""

import pytest

from meswitch.errors import ConfigError
from meswitch.vllm import compat
from meswitch.vllm.command import DeltaSettings

pytestmark = pytest.mark.vllm


def test_the_installed_vllm_keeps_the_contract():
    assert compat.missing_symbols() == []
    assert compat.missing_symbols(compat.SERVER_CONTRACT) == []
    assert compat.OLDEST <= compat.version()[:2] <= compat.NEWEST


def test_a_symbol_that_moved_is_named():
    contract = (
        compat.Symbol("vllm.lora.utils", "replace_submodule", ("model", "module_name", "new_module")),
        compat.Symbol("vllm.lora.utils", "replace_everything"),
        compat.Symbol("vllm.lora.nowhere", "Thing"),
        compat.Symbol("vllm.lora.utils", "replace_submodule", ("model", "colour")),
    )
    gone, nowhere, changed = compat.missing_symbols(contract)
    assert gone.startswith("vllm.lora.utils.replace_everything: gone")
    assert nowhere.startswith("vllm.lora.nowhere.Thing: gone")
    assert changed.startswith("vllm.lora.utils.replace_submodule: no longer takes colour")


def test_another_version_is_refused_only_where_something_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(compat, "version", lambda: (0, 40, 0))
    compat.check()
    assert "vLLM 0.40.0 has all that meswitch uses, but only 0.25 to 0.33 have been tried" in caplog.text
    monkeypatch.setattr(compat, "missing_symbols", lambda: ["vllm.a.b: gone (no module)"])
    with pytest.raises(
        ConfigError, match=r"vLLM 0\.40\.0: meswitch knows 0\.25 to 0\.33; this one lacks:\n  vllm\.a\.b"
    ):
        compat.check()


def test_settings_name_the_field_that_is_wrong():
    assert DeltaSettings.of({"meswitch": {"bits": 4, "experts": ["a"]}}) == DeltaSettings(bits=4, experts=("a",))
    for given, reason in (
        ({"bit": 4}, "additional_config.meswitch.bit: no such field"),
        ({"experts": "a"}, "additional_config.meswitch.experts: must be a list of texts"),
        ({"lora": 1}, "additional_config.meswitch.lora: must be true or false"),
        ({"bits": "4"}, "additional_config.meswitch.bits: must be a number"),
    ):
        with pytest.raises(ConfigError, match=reason):
            DeltaSettings.of({"meswitch": given})
