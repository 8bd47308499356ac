"""Choose the precision that the models compute in, from the settings, this machine and the model repository."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from service.core.card import ModelCard
from service.core.precision import REDUCED, Choice, Cpu, NotOffered, built_in, choose
from service.settings import Settings, SettingsError

CPUINFO = Path("/proc/cpuinfo")


def choice(settings: Settings, card: ModelCard, *, gateways_elsewhere: bool = False) -> Choice:
    """Choose. Raises SettingsError if the setting cannot be met.

    A gateway and its Triton must agree, because the precision is a part of the feature cache's keys. So auto is FP32
    if they start apart: neither can know the other's CPU.
    """
    wanted = settings.precision
    if card.precision != "fp32":
        try:
            return Choice((card if wanted == "auto" else card.computed_in(wanted)).precision, "as built")
        except NotOffered as exc:
            raise SettingsError(f"GLIMPSE_PRECISION is {wanted}: {exc}") from exc
    if not settings.embedded or (gateways_elsewhere and wanted == "auto"):
        return Choice("fp32", "the gateway and Triton start apart") if wanted == "auto" else Choice(wanted, "as set")
    files = {model: [path.name for path in (settings.model_repository / model / "1").glob("*")] for model in REDUCED}
    try:
        cpu = Cpu.of(CPUINFO.read_text()) if CPUINFO.exists() else Cpu()
        return choose(wanted, cpu, built_in(files), has_openvino(), card.precisions)
    except NotOffered as exc:
        raise SettingsError(f"GLIMPSE_PRECISION is {wanted}: {exc}") from exc


def has_openvino() -> bool:
    """Whether OpenVINO is installed here."""
    return importlib.util.find_spec("openvino") is not None
