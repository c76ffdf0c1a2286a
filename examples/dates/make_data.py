"""Generates train.jsonl and eval.jsonl: English dates and durations with their ISO 8601 notation.

The dates and durations are free-form text. Rows are split by meaning, not by wording: the training
rows contain no held-out date and no held-out duration in any wording. The output is deterministic.
The script takes no arguments.
"""

import datetime
import hashlib
import json
import random
from pathlib import Path

from words import (MONTHS, SHORT_MONTHS, WEEKDAYS, cardinal, ordinal, short_ordinal, spoken_time,
                   twelve_hour_time)

SEED = 8601
TRAIN_ROWS = 4000
EVAL_ROWS = 240
FIRST_DAY, LAST_DAY = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
# One in HELD_OUT_SHARE meanings is held out.
HELD_OUT_SHARE = 12

# Per unit: the ISO 8601 designator (a leading T marks the time part), the largest value when the
# unit is alone, the largest value when the unit is combined with others, the long and short names.
UNITS = {
    "year": ("Y", 40, 40, ["year", "yr"]),
    "month": ("M", 48, 11, ["month", "month"]),
    "week": ("W", 60, 60, ["week", "wk"]),
    "day": ("D", 99, 30, ["day", "day"]),
    "hour": ("TH", 72, 23, ["hour", "hr"]),
    "minute": ("TM", 99, 59, ["minute", "min"]),
    "second": ("TS", 99, 59, ["second", "sec"]),
}
COMBINED = [("year", "month"), ("year", "month", "day"), ("month", "day"), ("day", "hour"),
            ("hour", "minute"), ("hour", "minute"), ("hour", "minute", "second"),
            ("minute", "second"), ("day", "hour", "minute")]
# Idioms whose meaning cannot be inferred from other rows. The training rows contain all idioms, and
# rows with the same meanings are never held out.
IDIOMS = {
    "half an hour": "PT30M", "a half hour": "PT30M", "a quarter of an hour": "PT15M",
    "quarter of an hour": "PT15M", "three quarters of an hour": "PT45M",
    "an hour and a half": "PT1H30M", "an hour and a quarter": "PT1H15M", "half a minute": "PT30S",
    "a minute and a half": "PT1M30S", "half a day": "PT12H", "a day and a half": "P1DT12H",
    "half a year": "P6M", "a year and a half": "P1Y6M", "a fortnight": "P2W", "a decade": "P10Y",
    "a century": "P100Y", "a couple of days": "P2D", "a couple of weeks": "P2W",
    "a couple of hours": "PT2H", "a year": "P1Y", "a month": "P1M", "a week": "P1W", "a day": "P1D",
    "an hour": "PT1H", "a minute": "PT1M", "a second": "PT1S", "one year": "P1Y", "one month": "P1M",
    "one week": "P1W", "one day": "P1D", "one hour": "PT1H", "one minute": "PT1M",
    "one second": "PT1S",
}


def date_text(rng, day):
    """Returns a date in a random common English notation."""
    d, m, y = day.day, day.month, day.year
    month, short = MONTHS[m - 1], SHORT_MONTHS[m - 1]
    if short != month and rng.random() < 0.4:
        short += "."
    weekday = WEEKDAYS[day.weekday()]
    forms = [f"{month} {d}, {y}", f"{month} {short_ordinal(d)}, {y}", f"{d} {month} {y}",
             f"{short_ordinal(d)} {month} {y}", f"the {short_ordinal(d)} of {month} {y}",
             f"{short_ordinal(d)} of {month}, {y}", f"the {ordinal(d)} of {month} {y}",
             f"{month} the {ordinal(d)}, {y}", f"{month} {d} {y}", f"{short} {d}, {y}",
             f"{d} {short} {y}", f"{weekday}, {month} {d}, {y}", f"{weekday}, {d} {month} {y}",
             f"{weekday} the {short_ordinal(d)} of {month} {y}",
             f"{weekday[:3]}, {d} {SHORT_MONTHS[m - 1]} {y}"]
    if d > 12:  # for smaller days, the order of day and month is ambiguous
        forms += [f"{m:02}/{d:02}/{y}", f"{d:02}.{m:02}.{y}"]
    return rng.choice(forms)


def time_text(rng, hour, minute):
    """Returns a clock time in a random common English notation."""
    if (hour, minute) == (12, 0) and rng.random() < 0.5:
        return "noon"
    forms = [f"{hour:02}:{minute:02}"]
    suffix = rng.choice([(" am", " pm"), (" AM", " PM"), ("am", "pm"), (" a.m.", " p.m.")])
    forms.append(f"{(hour - 1) % 12 + 1}{suffix[hour >= 12]}" if minute == 0
                 else twelve_hour_time(hour, minute, suffix))
    if minute % 5 == 0 and hour >= 5 and (hour, minute) < (23, 35):
        forms += [spoken_time(hour, minute)] * 2
    return rng.choice(forms)


def date_row(rng):
    day = FIRST_DAY + datetime.timedelta(days=rng.randrange((LAST_DAY - FIRST_DAY).days + 1))
    text = date_text(rng, day)
    if rng.random() < 0.1:
        text = f"on {text}"
    return text, day.isoformat(), day.isoformat()


def month_row(rng):
    month, year = rng.randrange(12), rng.randint(FIRST_DAY.year, LAST_DAY.year)
    text = rng.choice([f"{MONTHS[month]} {year}", f"{SHORT_MONTHS[month]} {year}",
                       f"{MONTHS[month]} of {year}"])
    answer = f"{year}-{month + 1:02}"
    return text, answer, answer


def date_time_row(rng):
    day = FIRST_DAY + datetime.timedelta(days=rng.randrange((LAST_DAY - FIRST_DAY).days + 1))
    hour = rng.randrange(24) if rng.random() < 0.2 else rng.randint(6, 22)
    minute = (rng.randrange(60) if rng.random() < 0.3
              else rng.choice([0, 0, 15, 30, 30, 45, 10, 20, 5, 25, 35, 40, 50, 55]))
    date, time = date_text(rng, day), time_text(rng, hour, minute)
    text = rng.choice([f"{date} at {time}", f"{date} at {time}", f"{date}, {time}", f"{time} on {date}"])
    return text, f"{day.isoformat()}T{hour:02}:{minute:02}", day.isoformat()


def iso_duration(parts):
    """Returns a duration in ISO 8601 notation: [("hour", 2), ("minute", 15)] -> PT2H15M."""
    text, in_time = "P", False
    for unit, n in parts:
        designator = UNITS[unit][0]
        if designator[0] == "T" and not in_time:
            text, in_time = text + "T", True
        text += f"{n}{designator[-1]}"
    return text


def duration_row(rng):
    kind = rng.random()
    if kind < 0.08:
        unit, half = rng.choice([("hour", ("minute", 30)), ("year", ("month", 6)),
                                 ("minute", ("second", 30))])
        n = rng.randint(1, 20)
        number = cardinal(n) if rng.random() < 0.6 else str(n)
        text, parts = f"{number} and a half {unit}s", [(unit, n), half]
    else:
        units = (rng.choice(list(UNITS)),) if kind < 0.4 else rng.choice(COMBINED)
        if len(units) == 1:
            parts = [(units[0], rng.randint(2, UNITS[units[0]][1]))]
        else:
            parts = [(unit, rng.randint(1, UNITS[unit][2])) for unit in units]
        text = duration_text(rng, parts)
    if rng.random() < 0.08:
        text = f"for {text}"
    answer = iso_duration(parts)
    return text, answer, answer


def duration_text(rng, parts):
    form = rng.random()
    if form < 0.08 and len(parts) > 1 and all(UNITS[unit][0] != "M" for unit, _ in parts):
        return " ".join(f"{n}{'min' if unit == 'minute' else unit[0]}" for unit, n in parts)
    name = 1 if form < 0.25 else 0
    in_words = name == 0 and rng.random() < 0.45
    pieces = []
    for unit, n in parts:
        number = cardinal(n) if in_words else str(n)
        pieces.append(f"{number} {UNITS[unit][3][name]}{'s' if n != 1 else ''}")
    if len(pieces) == 1:
        return pieces[0]
    last = rng.choice([" and ", " and ", ", " if len(pieces) == 2 else ", and ", " "])
    return ", ".join(pieces[:-1]) + last + pieces[-1]


def any_row(rng):
    kind = rng.choices([date_row, date_time_row, month_row, duration_row], [36, 26, 4, 34])[0]
    text, answer, meaning = kind(rng)
    style = rng.random()
    if style < 0.12:
        text = text.lower()
    elif style < 0.3:
        text = text[0].upper() + text[1:]
    return text, answer, meaning


def is_held_out(meaning):
    return (meaning not in IDIOMS.values()
            and hashlib.sha256(meaning.encode()).digest()[0] % HELD_OUT_SHARE == 0)


def write_jsonl(path, rows):
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for prompt, answer in rows:
            messages = [{"role": "user", "content": prompt},
                        {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


def main():
    rng = random.Random(SEED)
    train, held_out, seen = list(IDIOMS.items()), [], set(IDIOMS)
    while len(train) < TRAIN_ROWS or len(held_out) < EVAL_ROWS:
        text, answer, meaning = any_row(rng)
        rows, most = (held_out, EVAL_ROWS) if is_held_out(meaning) else (train, TRAIN_ROWS)
        if text.lower() not in seen and len(rows) < most:
            seen.add(text.lower())
            rows.append((text, answer))
    rng.shuffle(train)
    here = Path(__file__).parent
    write_jsonl(here / "train.jsonl", train)
    write_jsonl(here / "eval.jsonl", held_out)


if __name__ == "__main__":
    main()
