"""Words shared by the corpus and the task data: numbers, months, weekdays and clock times."""

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December"]
SHORT_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
          "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
          "nineteen"]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
             "nine": "ninth", "twelve": "twelfth"}


def cardinal(n):
    """Returns the cardinal number n, from 0 to 99, in words: 42 -> forty-two."""
    if n < 20:
        return _SMALL[n]
    return _TENS[n // 10] + ("-" + _SMALL[n % 10] if n % 10 else "")


def ordinal(n):
    """Returns the ordinal number n, from 1 to 99, in words: 21 -> twenty-first."""
    head, dash, last = cardinal(n).rpartition("-")
    if last in _ORDINALS:
        last = _ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return head + dash + last


def short_ordinal(n):
    """Returns the ordinal number n, from 1 to 99, in digits: 21 -> 21st."""
    suffix = "th" if n // 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def part_of_day(hour):
    """Returns the English phrase for the part of the day that contains an hour from 0 to 23."""
    if hour < 12:
        return "in the morning"
    if hour < 18:
        return "in the afternoon"
    return "in the evening" if hour < 22 else "at night"


def spoken_time(hour, minute):
    """Returns a clock time in words: (16, 30) -> half past four in the afternoon.

    `minute` must be a multiple of 5.
    """
    past = {0: None, 15: "quarter past", 30: "half past", 45: "quarter to"}
    if minute in past:
        lead = past[minute]
    elif minute < 30:
        lead = f"{cardinal(minute)} past"
    else:
        lead = f"{cardinal(60 - minute)} to"
    named = cardinal((hour + (minute > 30) - 1) % 12 + 1)
    return f"{lead} {named} {part_of_day(hour)}" if lead else f"{named} o'clock {part_of_day(hour)}"


def twelve_hour_time(hour, minute, suffix):
    """Returns a 12-hour clock time in digits: (17, 5) -> 5:05 pm.

    `suffix` is a pair of suffixes for the morning and the afternoon, such as (" am", " pm").
    """
    return f"{(hour - 1) % 12 + 1}:{minute:02}{suffix[hour >= 12]}"
