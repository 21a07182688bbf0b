"""Is the reference the model that a user would load, and is the truth the same model in higher precision?

The reference is built and loaded piece by piece, tapped and called with captured arguments; the truth is a copy of it.
Any of that may be wrong for an architecture that nobody has tried. So on every run three things are looked at, on a few
tokens, for all of a small model or the first layer of each kind:

* the pieces give at every site, bit for bit, what a model loaded by `from_pretrained` gives in one go;
* every parameter and buffer of the truth is the reference's own number, in the precision of the truth;
* at every site, truth and reference differ on the same inputs by no more than the dtype allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parity.errors import ParityError
from parity.record.chain import find_layers, kind_of
from parity.record.scans import SCAN
from parity.record.tap import Tap, quiet_torch, tapping
from parity.reference.batch import Batch
from parity.reference.build import auto_class
from parity.reference.checkpoint import first_sentence
from parity.reference.pieces import HEAD, Piece, PiecewiseModel
from parity.reference.precision import unit_roundoff
from parity.reference.replay import Reference
from parity.reference.weights import replace_numbers
from parity.results import Check

_ROWS, _TOKENS = 2, 64
# Above this many unit roundoffs, on the same inputs, the truth is another operation; see `_apart`.
_APART = 4096.0
# A relative difference that no rounding explains, in any dtype.
_OTHER = 0.5
_MASKED = 1e30
# A user's model is not loaded for the check if its first layers take more memory than this.
_LARGEST = 8 << 30

Values = dict[str, Tensor]
Twins = list[tuple[str, nn.Module, nn.Module | None]]
_done: dict[tuple[Any, ...], list[Check]] = {}


def self_check(reference: Reference, input_ids: Tensor | Batch) -> list[Check]:
    """Check a reference on the first of the token ids (b, t), once in a process for a checkpoint run in one way."""
    working, batch = reference.working, Batch.of(input_ids)
    changed = tuple(file.stat().st_mtime_ns for file in working.checkpoint.files)
    weights = working.checkpoint.weights and working.checkpoint.weights.name
    way = (working.dtype, str(working.device), working.attention, len(working.sites), weights, batch.text is None)
    key = (working.checkpoint.path, working.checkpoint.fingerprint(), changed, *way)
    if key not in _done:
        try:
            _done[key] = checked(reference, batch.starting(_ROWS, _TOKENS))
        except ParityError:
            raise
        except Exception as error:  # whatever transformers' own code raises
            reason = f"it fails with {type(error).__name__}: {first_sentence(error)}"
            _done[key] = [Check("the reference checks itself", False, reason, vital=True)]
    return _done[key]


def checked(reference: Reference, input_ids: Tensor | Batch) -> list[Check]:
    """The three checks, on token ids (b, t)."""
    working, batch = reference.working, Batch.of(input_ids)
    pieces = pieces_to_check(working)
    expected = _stock_values(working, batch, pieces)
    differing: list[str] = []
    twins, copied = _twins(reference), dict[str, bool]()
    apart: list[str] = []
    hidden = None
    for piece in pieces:
        mine: Values = {}
        with working.loaded(piece), reference.precise.loaded(piece):
            # Running may change a table to suit the tokens, so numbers are looked at first, and once.
            if not (copied and working.is_small):  # whose numbers are in memory all at once
                copied |= _copied(twins, reference.precise.dtype, copied)
            before, hidden = hidden, working.run(piece, batch, hidden, _into(mine))
            differing += [
                site for site, value in mine.items() if site in expected and not _equal(value, expected[site])
            ]
            apart += _apart(reference, piece, batch, before, mine)
    same = (
        f"bit-equal at {len(expected)} sites" if expected else "not compared: its first layers cannot be loaded alone"
    )
    other = [name for name, same in copied.items() if not same]
    return [
        _check("reference is from_pretrained", differing, "not what the loaded model gives", same),
        _check(
            "truth has the reference's numbers",
            other,
            "another number or precision",
            "every one",
        ),
        _check("truth agrees with reference", apart, "further apart than rounding explains", "within rounding"),
    ]


def _into(values: Values) -> Tap:
    def tap(site: str, value: Tensor) -> Tensor:
        values[site] = value.clone()
        return value

    return tap


def _check(name: str, sites: list[str], what: str, fine: str) -> Check:
    return Check(name, not sites, f"{sites[0]}: {what}" if sites else fine, vital=True)


def pieces_to_check(working: PiecewiseModel) -> list[Piece]:
    """All pieces of a small model; of a large one those up to the last layer that is the first of its kind."""
    if working.is_small or not working.is_cut:
        return working.pieces
    kinds = [kind_of(layer) for layer in working.layers]
    last = max(kinds.index(kind) for kind in kinds)
    return working.pieces[: last + 2]


def _stock_values(working: PiecewiseModel, batch: Batch, pieces: list[Piece]) -> Values:
    """What the loaded model gives at the sites of some pieces that its modules take or return; empty if too large."""
    wanted = [s for p in pieces for s in working.sites_of(p) if s.where in ("input", "output", SCAN)]
    model = _stock(working, len(working.layers) if HEAD in pieces else len(pieces) - 1)
    values: Values = {}
    if model is not None:
        with quiet_torch(), tapping(model, wanted, _into(values)):
            model(**batch.arguments(model, working.device), use_cache=False)
    return values


def _stock(working: PiecewiseModel, layers: int) -> Any:
    """The model as `from_pretrained` gives it, of a large one only the first layers.

    None if even these are too large, or would not be the same layers without the others.
    """
    from transformers import AutoConfig

    trust, path = working.checkpoint.trust_remote_code, working.checkpoint.path
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    chosen = {"attn_implementation": working.attention, "dtype": working.dtype, "trust_remote_code": trust}
    if experts := getattr(working.config, "_experts_implementation", None):
        chosen["experts_implementation"] = experts
    if layers < len(working.layers):
        _shorten(config.get_text_config(), layers)
        with torch.device("meta"):
            model = auto_class(config).from_config(config, **chosen).eval()
        alike = [kind_of(layer) for layer in find_layers(model)] == [kind_of(x) for x in working.layers[:layers]]
        if not alike or sum(p.nbytes for p in model.parameters()) > _LARGEST:
            return None
    with quiet_torch(), _silent():
        model = auto_class(config).from_pretrained(path, config=config, **chosen).to(working.device).eval()
    if working.checkpoint.weights is not None:
        replace_numbers(model, working.checkpoint, model.modules())
        model.tie_weights()
    return model


def _shorten(config: Any, layers: int) -> None:
    """A configuration with its first layers only."""
    count = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


@contextmanager
def _silent() -> Iterator[None]:
    """transformers has much to say about layers that a shortened model leaves in the file."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _equal(mine: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    same = mine.dtype == other.dtype and mine.shape == other.shape
    return same and bool(((mine == other) | (mine.isnan() & other.isnan())).all())


def _twins(reference: Reference) -> Twins:
    """Every module of the truth by name, with the reference's own."""
    theirs = dict(reference.working.model.named_modules(remove_duplicate=False))
    every = reference.precise.model.named_modules(remove_duplicate=False)
    return [(name, module, theirs.get(name)) for name, module in every]


def _copied(twins: Twins, dtype: torch.dtype, known: Collection[str]) -> dict[str, bool]:
    """Which parameters and buffers in memory are the reference's own numbers, in the dtype of the truth.

    Those that are known already are not looked at again.
    """
    return {
        name: mine.dtype is dtype and name in theirs and torch.equal(mine, theirs[name].to(mine.dtype))
        for at, module, other in twins
        for theirs in (_numbers(at, other),)
        for name, mine in _numbers(at, module).items()
        if name not in known and mine.is_floating_point()
    }


def _numbers(at: str, module: nn.Module | None) -> Values:
    """A module's own parameters and buffers that are in memory, by their full names."""
    own = () if module is None else (*module._parameters.items(), *module._buffers.items())
    there = ((name, value) for name, value in own if value is not None and not value.is_meta)
    return {f"{at}.{name}" if at else name: value for name, value in there}


def _apart(reference: Reference, piece: Piece, batch: Batch, before: Tensor | None, mine: Values) -> list[str]:
    """Sites of a piece at which truth and reference differ too much on the reference's own values `mine`."""
    precise, limit = reference.precise, min(_APART * unit_roundoff(reference.working.dtype), _OTHER)
    far: list[str] = []
    dims = {site.name: site.dims for site in precise.sites}

    def tap(site: str, fresh: Tensor) -> Tensor:
        own = mine[site]
        text = batch.rows(dims[site], fresh.shape, fresh.device)
        sides = (own, fresh) if text is None else (own[text], fresh[text])
        if fresh.is_floating_point() and _difference(*sides) > limit:
            far.append(site)
        # Nothing follows the last site.
        return fresh if site == precise.sites[-1].name else own.to(fresh.dtype)

    precise.run(piece, batch, None if before is None else before.to(precise.dtype), tap)
    return far


def _difference(own: Tensor, truth: Tensor) -> float:
    """Relative difference of all rows, or of the median row if that is smaller.

    A few rows may differ in earnest, where two experts are all but equally good.
    """
    plain = own.isfinite() & truth.isfinite() & (truth.abs() < _MASKED)
    wide = torch.where(plain, truth, 0).double().reshape(-1, truth.shape[-1])
    error = torch.where(plain, own, 0).double().reshape(wide.shape) - wide
    squares, sizes = error.square().sum(-1), wide.square().sum(-1)
    rows = squares[sizes > 0] / sizes[sizes > 0]
    return float(torch.minimum(squares.sum() / sizes.sum(), rows.median()).sqrt()) if len(rows) else 0.0
