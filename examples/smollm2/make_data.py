"""Writes train.jsonl and eval.jsonl: US addresses as people write them, and their parts as JSON.

    pip download --no-deps --no-binary usaddress usaddress==0.5.16
    python make_data.py usaddress-0.5.16.tar.gz

The source distribution of usaddress (MIT licence, DataMade) contains addresses that people labelled
by hand. Addresses with the name of a recipient and street corners are left out. Rows are split by
number and street: no place is in both files. The output is deterministic.
"""

import argparse
import hashlib
import json
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
LABELLED = "training/labeled.xml"
EVAL_ROWS = 200

# The keys of an answer and the labels that they combine. Addresses with other labels are left out.
PARTS = {
    "building": ["BuildingName", "LandmarkName"],
    "number": ["AddressNumberPrefix", "AddressNumber", "AddressNumberSuffix"],
    "street": ["StreetNamePreModifier", "StreetNamePreDirectional", "StreetNamePreType", "StreetName",
               "StreetNamePostType", "StreetNamePostDirectional", "StreetNamePostModifier"],
    "unit": ["OccupancyType", "OccupancyIdentifier", "SubaddressType", "SubaddressIdentifier"],
    "box": ["USPSBoxGroupType", "USPSBoxGroupID", "USPSBoxType", "USPSBoxID"],
    "city": ["PlaceName"],
    "state": ["StateName"],
    "zip": ["ZipCode", "ZipPlus4"],
}
KEYS = {label: key for key, labels in PARTS.items() for label in labels}
SYSTEM = f"Split the US address into JSON with the keys {', '.join(PARTS)}. Leave out missing keys."


def clean(text):
    return " ".join(text.split()).strip(" ,;")


def split_address(element):
    """Returns the parts of a labelled address in the order of the text.

    Returns None if a label has no key, or if a key has words in two places.
    """
    parts, last = {}, None
    for word in element:
        key = KEYS.get(word.tag)
        if key is None or (key in parts and key != last):
            return None
        parts[key] = parts.get(key, "") + (word.text or "") + (word.tail or "")
        last = key
    return {key: clean(text) for key, text in parts.items()}


def addresses(path):
    """Returns the distinct addresses as (text, parts) pairs in the order of the file."""
    with tarfile.open(path) as archive:
        name, = (name for name in archive.getnames() if name.endswith("/" + LABELLED))
        root = ElementTree.parse(archive.extractfile(name)).getroot()
    distinct = {}
    for element in root:
        text, parts = clean("".join(element.itertext())), split_address(element)
        if parts and all(parts.values()):
            distinct.setdefault(text.lower(), (text, parts))
    return list(distinct.values())


def place(parts):
    return " ".join(parts.get(key, "") for key in ["building", "number", "street", "box"]).lower()


def split(rows):
    """Returns the training rows and the evaluation rows; a hash of the place decides."""
    def rank(row):
        return hashlib.sha256(place(row[1]).encode()).hexdigest()

    ranked = sorted(rows, key=rank)
    held_out = {place(parts) for _, parts in ranked[:EVAL_ROWS]}
    train = [row for row in ranked[EVAL_ROWS:] if place(row[1]) not in held_out]
    return train, ranked[:EVAL_ROWS]


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text, parts in rows:
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text},
                        {"role": "assistant", "content": json.dumps(parts)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"{path.name}: {len(rows)} rows")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sdist", type=Path, help="source distribution of usaddress")
    train, held_out = split(addresses(parser.parse_args().sdist))
    write(HERE / "train.jsonl", train)
    write(HERE / "eval.jsonl", held_out)


if __name__ == "__main__":
    main()
