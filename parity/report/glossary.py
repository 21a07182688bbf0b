"""What the words of a report mean, for whoever meets them there for the first time."""

WORDS: dict[str, str] = {
    "floor": "The rounding error that the reference itself makes at this operation, on the same inputs and in the "
    "working dtype: what cannot be avoided.",
    "ratio": "The local error in units of the floor. Up to 2 it is rounding; a bug makes it tens or thousands.",
    "local error": "What this operation added: its output, less the reference's operation on the candidate's own "
    "inputs in higher precision.",
    "inherited": "What came in with the inputs: an operation may be right and yet far from the reference's run.",
    "truth": "The reference's operation in higher precision, on the inputs that the candidate itself had.",
    "gain": "By how much the error follows the value: 0.06 means that the output is 6 % too large throughout. "
    "Rounding has none.",
    "span": "Sites just before that were not recorded: the fault may lie in any of their operations.",
    "remainder": "What is left of the local error when the reference is given this bug too, in units of the floor: "
    "about 1 if the bug explains it all.",
    "ULP": "Unit in the last place: the distance from a number to the next one that the dtype can hold.",
}
