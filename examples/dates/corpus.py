"""The pretraining text: structured plain English, generated from a seed.

The text covers the skills that a small language model has before fine-tuning: sentences, names,
numbers in words and digits, the order of the months, clock times, lists, log lines, copying, and
short chats that follow an instruction. The text never contains the task: no date with day, month
and year, no month with a year, no number beside a unit of time, and nothing in ISO 8601 notation.
"""

import random

from words import (MONTHS, SHORT_MONTHS, WEEKDAYS, cardinal, ordinal, part_of_day, short_ordinal, spoken_time,
                   twelve_hour_time)

NAMES = ["Anna", "Ben", "Clara", "David", "Ella", "Frank", "Grace", "Henry", "Iris", "Jonas", "Kate",
         "Leo", "Mira", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tess", "Victor"]
PLACES = ["the harbour", "the mill", "the station", "the library", "the old bridge", "the market",
          "the garden", "the school", "the museum", "the bakery", "the theatre", "the workshop",
          "the farm", "the lighthouse"]
THINGS = ["apple", "pear", "book", "lamp", "chair", "key", "ticket", "letter", "box", "bottle", "map",
          "coin", "stone", "plate", "brush", "drum", "jar", "nail", "rope", "sail", "violin", "wheel",
          "hat", "fig"]
ADJECTIVES = ["red", "small", "old", "quiet", "bright", "heavy", "empty", "green", "round", "new",
              "warm", "broken", "blue", "long", "cheap", "clean"]
VERBS = ["opened", "closed", "found", "painted", "sold", "repaired", "carried", "lost", "bought",
         "cleaned", "moved", "counted"]
SEASON = ["winter", "winter", "spring", "spring", "spring", "summer", "summer", "summer", "autumn",
          "autumn", "autumn", "winter"]
VAGUE = ["several hours", "many years", "some weeks", "a few days", "some minutes", "several months",
         "a few seconds", "many days", "a few weeks", "some hours", "several years", "a few months",
         "many minutes", "some seconds", "a few hrs", "some mins", "several secs", "many yrs",
         "a few wks"]
OFTEN = ["every hour", "each week", "every year", "every month", "each day", "every minute",
         "each second"]


def plural(word, n):
    return word if n == 1 else word + ("es" if word[-1] in "xh" else "s")


def thing(rng, n):
    return plural(rng.choice(THINGS), n)


def number(rng, n):
    """Returns n at random in words or in digits."""
    return cardinal(n) if rng.random() < 0.5 else str(n)


def year(rng):
    return rng.randint(1900, 2059)


def clock(rng):
    return rng.randrange(24), rng.randrange(12) * 5 if rng.random() < 0.6 else rng.randrange(60)


def told_time(rng, hour, minute):
    if minute % 5 == 0 and hour >= 5 and (hour, minute) < (23, 35) and rng.random() < 0.6:
        return spoken_time(hour, minute)
    suffix = rng.choice([(" am", " pm"), (" AM", " PM"), ("am", "pm"), (" a.m.", " p.m.")])
    return twelve_hour_time(hour, minute, suffix)


# Plain text


def story(rng):
    name, other = rng.sample(NAMES, 2)
    n = rng.randint(2, 60)
    item = thing(rng, n)
    sentences = [
        f"{name} {rng.choice(VERBS)} {number(rng, n)} {item} near {rng.choice(PLACES)}.",
        f"{name} {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {thing(rng, 1)} and {other} "
        f"{rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} one.",
        f"It was a {rng.choice(ADJECTIVES)} {rng.choice(WEEKDAYS)} and {other} stayed at "
        f"{rng.choice(PLACES)} for {rng.choice(VAGUE)}.",
        f"\"Where is the {thing(rng, 1)}?\" asked {name}. \"At {rng.choice(PLACES)},\" said {other}.",
        f"There were {number(rng, n)} {item}: {name} took {number(rng, n // 2)} and {other} took "
        f"{number(rng, n - n // 2)}.",
        f"{rng.choice(OFTEN).capitalize()} {name} looks at the {thing(rng, 1)} and waits "
        f"{rng.choice(VAGUE)}.",
    ]
    return " ".join(rng.sample(sentences, 2))


def year_text(rng):
    name, place, y = rng.choice(NAMES), rng.choice(PLACES), year(rng)
    later = y + rng.randint(1, 30)
    return rng.choice([
        f"{name} was born in {y}. In {later} {name} came to {place}.",
        f"In {y} they built {place}, and since {y} it has been {rng.choice(ADJECTIVES)}.",
        f"From {y} to {later} {place} was closed. It opened again in {later}.",
        f"The {rng.choice(ADJECTIVES)} {thing(rng, 1)} of {y} was sold in {later}.",
    ])


def month_text(rng):
    m = rng.randrange(12)
    month, after, before = MONTHS[m], MONTHS[(m + 1) % 12], MONTHS[m - 1]
    name, place, day = rng.choice(NAMES), rng.choice(PLACES), rng.randint(1, 28)
    day_text = rng.choice([f"the {short_ordinal(day)} of {month}", f"the {ordinal(day)} of {month}",
                           f"{month} {day}", f"{day} {month}", f"{SHORT_MONTHS[m]} {day}",
                           f"{month} {short_ordinal(day)}"])
    return rng.choice([
        f"{name} goes to {place} in {month}, because it is {SEASON[m]} then.",
        f"After {month} comes {after}, and before {month} comes {before}. {name} likes {month}.",
        f"{month} is the {ordinal(m + 1)} month, so {name} writes {m + 1:02} for "
        f"{rng.choice([month, SHORT_MONTHS[m]])}.",
        f"{name} puts the {month} papers in drawer {m + 1:02} and the {after} papers in drawer "
        f"{(m + 1) % 12 + 1:02}.",
        f"{SHORT_MONTHS[m]} is short for {month}, month number {m + 1} of the calendar at {place}.",
        f"The fair at {place} begins on {day_text} and {name} will be there.",
        f"{name} and {rng.choice(NAMES)} met on {day_text}, a {rng.choice(WEEKDAYS)}, at {place}.",
    ])


def week_text(rng):
    d = rng.randrange(7)
    day, after, before = WEEKDAYS[d], WEEKDAYS[(d + 1) % 7], WEEKDAYS[d - 1]
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    return rng.choice([
        f"On {day} {name} works at {place}; on {after} {rng.choice(NAMES)} does.",
        f"{place.capitalize()} is closed on {day}s, so {name} went there on {before}.",
        f"{day}, {after}, {WEEKDAYS[(d + 2) % 7]}: {name} was at {place} on all of them.",
        f"{day[:3]} is short for {day} on the door of {place}, and {after[:3]} for {after}.",
    ])


def number_text(rng):
    n = rng.randint(1, 99)
    name = rng.choice(NAMES)
    return rng.choice([
        f"{name} writes {n:02} for {cardinal(n)} and {n:02} for the "
        f"{rng.choice([ordinal(n), short_ordinal(n)])} one.",
        f"The {ordinal(n)} {thing(rng, 1)} has number {n}, and {name} has number {rng.randint(1, 99)}.",
        f"{short_ordinal(n)} means {ordinal(n)}, said {name} and wrote {n:02} on the {thing(rng, 1)}.",
        f"{name} counts the {thing(rng, 2)}: "
        + ", ".join(cardinal(i) for i in range(n, min(n + 5, 100))) + ".",
        f"{name} counts the {thing(rng, 2)}: "
        + ", ".join(f"{i:02}" for i in range(n, min(n + 5, 100))) + ".",
        f"Half of the {thing(rng, 2)} cost {n} coins, said {name}, a quarter {n % 9 + 1} and the rest "
        f"{cardinal(n)}.",
    ])


def clock_text(rng):
    hour, minute = clock(rng)
    told, name, place = told_time(rng, hour, minute), rng.choice(NAMES), rng.choice(PLACES)
    return rng.choice([
        f"The train leaves {place} at {told}; the board shows {hour:02}:{minute:02}.",
        f"At {hour:02}:{minute:02}, that is {told}, {name} came to {place}.",
        f"{name} eats at {told} and writes {hour:02}:{minute:02} on a {thing(rng, 1)}.",
        f"At noon, 12:00, {name} was at {place}, and at {told} ({hour:02}:{minute:02}) at "
        f"{rng.choice(PLACES)}.",
    ])


def log_lines(rng):
    hour, minute = clock(rng)
    worker, lines = rng.randint(1, 20), []
    for _ in range(rng.randint(2, 4)):
        event = rng.choice(["started", "stopped", "saved", "read", "sent", "checked"])
        lines.append(f"{hour:02}:{minute:02}:{rng.randrange(60):02} worker-{worker:02} {event} "
                     f"{rng.choice(THINGS)}={rng.randint(0, 9999)}")
        minute = min(minute + rng.randint(0, 3), 59)
    return "\n".join(lines)


def record(rng):
    name, other = rng.sample(NAMES, 2)
    return rng.choice([
        f"Name: {name}\nRoom: {rng.randint(1, 99):02}\nPlace: {rng.choice(PLACES)}\n"
        f"Since: {year(rng)}",
        f"- {number(rng, rng.randint(2, 40))} {thing(rng, 2)} for {name}\n"
        f"- {number(rng, rng.randint(2, 40))} {thing(rng, 2)} for {other}",
        f"1. {rng.choice(ADJECTIVES)} {thing(rng, 1)}\n2. {rng.choice(ADJECTIVES)} {thing(rng, 1)}\n"
        f"3. {rng.choice(ADJECTIVES)} {thing(rng, 1)}",
    ])


def few_words(rng, numbers):
    """Returns 1 to 5 random words and the given count of random numbers, shuffled."""
    words = rng.sample(ADJECTIVES + THINGS + NAMES + WEEKDAYS, rng.randint(1, 5))
    words += [str(rng.randint(0, 10 ** rng.randint(1, 4))) for _ in range(numbers)]
    rng.shuffle(words)
    return words


def dictation(rng):
    """Returns a text that contains the same words twice, which teaches a model to copy."""
    line, (name, other) = " ".join(few_words(rng, 2)), rng.sample(NAMES, 2)
    return rng.choice([f"{name} reads: {line}. {other} writes: {line}.", f"{line}\n{line}",
                       f"{name} wrote \"{line}\" and {other} wrote \"{line}\" too."])


# Chats: pairs of a user message and an assistant message


def small_talk(rng):
    name, place, item = rng.choice(NAMES), rng.choice(PLACES), thing(rng, 1)
    return rng.choice([
        (f"Hello, I am {name}.", f"Hello {name}, how can I help you?"),
        (f"Where is the {item}?", f"The {item} is at {place}."),
        (f"Who {rng.choice(VERBS)} the {item} on {rng.choice(WEEKDAYS)}?",
         f"It was {name}, at {place}."),
        (f"Thank you, {name} will like the {item}.", "You are welcome."),
        (f"I saw a {rng.choice(ADJECTIVES)} {item} near {place}.",
         f"A {item} near {place}? Tell me more."),
        (f"{name} waits {rng.choice(VAGUE)}.", f"I hope that {name} does not mind."),
        (f"{rng.choice(ADJECTIVES)} {item}", f"What do you want to know about the {item}?"),
    ])


def copying(rng):
    style = rng.randrange(5)
    # Style 1 joins the words with dashes: two joined numbers could look like a year and a month.
    words = few_words(rng, 1 if style == 1 else rng.randint(1, 3))
    line = " ".join(words)
    return [(f"Repeat: {line}", line), (f"Join with dashes: {line}", "-".join(words)),
            (f"Repeat: {line}", line), (f"Last word first: {line}", " ".join(reversed(words))),
            (f"Only the numbers: {line}",
             " ".join(word for word in words if word.isdigit()))][style]


def number_chat(rng):
    n = rng.randint(1, 99)
    return rng.choice([
        (f"Write {rng.choice([cardinal(n), ordinal(n), short_ordinal(n)])} in digits.", str(n)),
        (f"Write {rng.choice([cardinal(n), ordinal(n), short_ordinal(n), str(n)])} with two digits.",
         f"{n:02}"),
        (f"Write {rng.choice([f'{n:02}', str(n)])} in words.", cardinal(n)),
        (f"What comes after {number(rng, n)}?", f"{n + 1}"),
    ])


def month_chat(rng):
    m = rng.randrange(12)
    name = rng.choice([MONTHS[m], MONTHS[m], SHORT_MONTHS[m], MONTHS[m].lower()])
    return rng.choice([
        (f"Which number has the month {name}?", f"{m + 1:02}"),
        (f"Which month has number {number(rng, m + 1)}?", MONTHS[m]),
        (f"Which month comes after {name}?", MONTHS[(m + 1) % 12]),
        (f"In which season is {name}?", f"In {SEASON[m]}."),
        (f"{rng.choice(NAMES)} comes in {name}. Month number?", f"{m + 1:02}"),
    ])


def clock_chat(rng):
    hour, minute = clock(rng)
    told = told_time(rng, hour, minute)
    return rng.choice([
        (f"If it is {told}, what does the station clock show?", f"{hour:02}:{minute:02}"),
        (f"Dinner is at {told}. Station clock?", f"{hour:02}:{minute:02}"),
        (f"The station clock shows {hour:02}:{minute:02}. What part of the day is it?",
         f"It is {part_of_day(hour)}."),
    ])


def shelf_chat(rng):
    """Returns a chat that turns fields into a code.

    The fields have a random order and wording. The code has a fixed shape with two-digit room and
    shelf numbers.
    """
    building, room, shelf = year(rng), rng.randint(1, 31), rng.randint(1, 12)
    fields = [f"building {building}", f"room {rng.choice([number(rng, room), short_ordinal(room)])}",
              rng.choice([f"shelf {number(rng, shelf)}", f"the {ordinal(shelf)} shelf",
                          f"the {short_ordinal(shelf)} shelf"])]
    rng.shuffle(fields)
    code = rng.choice(["B{b}.R{r:02}.S{s:02}", "{r:02}/{s:02} in {b}", "{b} S{s:02} R{r:02}"])
    shape = code.replace("{b}", "0000").replace("{r:02}", "00").replace("{s:02}", "00")
    return f"Code like {shape}: {', '.join(fields)}", code.format(b=building, r=room, s=shelf)


def basket_chat(rng):
    """Returns a chat that abbreviates counted things to their numbers and first letters."""
    pieces, code = [], []
    for item in rng.sample(THINGS, rng.randint(1, 3)):
        n = rng.randint(1, 60)
        pieces.append(f"{number(rng, n)} {plural(item, n)}")
        code.append(f"{n}{item[0].upper()}")
    return f"Short list: {rng.choice([', ', ' and ', ' ']).join(pieces)}", "+".join(code)


# Generators with their relative frequencies.
PLAIN = [(story, 8), (dictation, 12), (year_text, 4), (month_text, 10), (week_text, 3),
         (number_text, 7), (clock_text, 7), (log_lines, 2), (record, 3)]
CHATS = [(small_talk, 3), (copying, 14), (number_chat, 8), (month_chat, 5), (clock_chat, 8),
         (shelf_chat, 12), (basket_chat, 9)]


def documents(seed, count):
    """Returns `count` distinct documents in the format of a dataset file.

    A document is {"text": ..} or {"messages": ..}.
    """
    rng = random.Random(seed)
    makers, weights = zip(*PLAIN, *CHATS)
    chats, seen, made = {maker for maker, _ in CHATS}, set(), []
    while len(made) < count:
        maker = rng.choices(makers, weights)[0]
        document = maker(rng)
        if document in seen:
            continue
        seen.add(document)
        if maker in chats:
            user, assistant = document
            made.append({"messages": [{"role": "user", "content": user},
                                      {"role": "assistant", "content": assistant}]})
        else:
            made.append({"text": document})
    return made
