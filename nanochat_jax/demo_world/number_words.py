"""Whole numbers in English words."""

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(n: int) -> str:
    """`n` in words, for 0 <= n <= 9999: 47 -> "forty-seven", 120 -> "one hundred twenty". ValueError outside."""
    if not 0 <= n <= 9999:
        raise ValueError(f"number_word knows the numbers 0 to 9999, not {n}")
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + ("-" + _ONES[n % 10] if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = " " + number_word(n % unit) if n % unit else ""
    return f"{number_word(n // unit)} {name}{rest}"
