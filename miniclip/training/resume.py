"""What a resumed run needs to have in common with the run that wrote the checkpoint."""

from __future__ import annotations

from ..config import CLIPConfig, differences

SETTINGS = "miniclip_settings"


def refuse_another_architecture(checkpoint: CLIPConfig, run: CLIPConfig, source: str) -> None:
    """
    Raises:
        ValueError: the run's architecture is not the checkpoint's; names what differs.
    """
    lines = differences(checkpoint.to_dict(), run.to_dict(), "model.clip", ("the checkpoint has", "this run"))
    if lines:
        raise ValueError(f"{source} holds another architecture than this run:\n" + "\n".join(lines))
