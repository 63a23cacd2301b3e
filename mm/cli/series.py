"""`mm generate` of a series: how it goes on, as a table of quantiles and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.cli.common import make_room, table, write_json
from mm.errors import UserError


def tell(
    generator: Any,
    run: Path,
    prompt: Mapping[str, Any],
    to: str,
    out: Path | None,
    json: Path | None,
    seed: int,
    asked: Mapping[str, Any],
) -> None:
    """Forecast from ``prompt``, write ``out`` and the picture beside it.

    Args:
        asked: `horizon`, `draws`, `temperature` of `mm.decoders.forecast.forecast`; None: default.
    Raises:
        UserError: no file to write or of another ending, values that are no series, and what
            `forecast` refuses.
    """
    from mm.decoders.forecast import check_ending, forecast, is_series, write_forecast

    if not is_series(generator.modality(to)):
        raise UserError(f"--to {to}: the model reads its values; of values it writes series alone")
    if out is None:
        raise UserError(f"--to {to} writes a file: name it with -o FILE.csv")
    check_ending(out)
    make_room(out)
    settings = {name: value for name, value in asked.items() if value is not None}
    given, draws = forecast(generator, prompt, to, seed=seed, **settings)
    try:
        files = write_forecast(given, draws, out)
    except OSError as error:
        raise UserError(f"-o {out}: cannot be written ({error.strerror})") from error
    what = f"{draws.shape[1]} points after {len(given)}, {draws.shape[0]} continuations"
    table(f"Generated {to}", ("file", "what"), [(str(file), what) for file in files])
    outputs = [{"file": files[0], "picture": files[1], "text": None, "what": what}]
    write_json(json, {"run": run, "to": to, "seed": seed, "sampling": settings, "outputs": outputs})
