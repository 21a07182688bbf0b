"""What was not to fail and did: it is noted, and the verdict comes out without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from parity.errors import ParityError
from parity.reasons import Stage, Trouble

_LONGEST = 200
_log = logging.getLogger("parity")


@contextmanager
def surviving(troubles: list[Trouble], stage: Stage, about: str = "") -> Iterator[None]:
    """Go on behind the block if it fails, and add to `troubles` what failed and why.

    A ParityError ends the run all the same: it tells the user of something that he has to mend. So does Ctrl-C.
    """
    try:
        yield
    except ParityError:
        raise
    except Exception as error:
        _log.debug("%s failed", stage, exc_info=True)
        said = " ".join(str(error).split())
        troubles.append(Trouble(stage, f"{type(error).__name__}: {said}"[:_LONGEST].removesuffix(": "), about))
