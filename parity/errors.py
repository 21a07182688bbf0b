"""Everything parity raises on purpose.

ParityError
├── UsageError         the call asks for something that cannot be
├── DumpError          a dump is unreadable, truncated, foreign or malformed
├── ModelError         the reference model cannot be found or loaded
├── CandidateError     the candidate cannot be found, loaded or run
└── IncomparableError  two runs do not answer the same question (other tokens, other model)

A message says what is wrong, what was found and how to fix it, in that order.
Errors end a run; what is wrong with a single site is a value (`Gap`, verdict), never an exception.
"""


def printable(text: str, keep: str = "") -> str:
    """The text with all that a terminal obeys or cannot show spelt out: escape sequences, directions, lone surrogates.

    `keep` holds the characters that pass as they are, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class ParityError(Exception):
    """Base of all errors that the CLI turns into one line and exit code 2."""


class UsageError(ParityError):
    """The options contradict each other or name something that does not exist."""


class DumpError(ParityError):
    """A dump is missing, unreadable, truncated or not what it claims to be."""


class ModelError(ParityError):
    """The reference model is unknown, incomplete or cannot be loaded here."""


class CandidateError(ParityError):
    """The candidate cannot be imported, built or run."""


class IncomparableError(ParityError):
    """Reference and candidate are answers to different questions."""
