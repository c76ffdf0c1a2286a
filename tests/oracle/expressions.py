"""Renders expressions of Jinja as Transformers renders chat templates."""

import json
from pathlib import Path

from transformers.utils import chat_template_utils

VARIABLES = {
    "d": {"b": 1, "a": "it's", "items": [1]},
    "e": {"x": 2, "y": None},
    "l": [3, 1, 2],
    "s": "the quick-brown fox, jumps over it's lazy dog",
    "h": "<a href=\"x\">B & 'c'</a>",
    "long": "aaaaaaaaaaaaaaaaaaaa bb\n\nccc dddd  eeeee\nf",
}
# Without what both print otherwise and no template needs: objects of Jinja, ranges and generators.
# Each is a template, or an expression if it has no tag.
EXPRESSIONS = """
(1, 2)
(1,)
()
[(1, 'a'), (2,)]
{'a': (1, 2)}
(1, 2) | list
(1, 2)[0]
(1, 2) + (3,)
(1, 2) == (1, 2)
(1, 2) == [1, 2]
((1, 2), 3) | tojson
e.keys()
e.values()
e.items()
e | items | list
e.items() | list
e.keys() | list
{}.keys()
e.keys() | length
e.items() | first
e | dictsort
{% for pair in e.items() %}{{ pair }};{% endfor %}
{% for pair in e | items %}{{ pair }};{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in e.items %}{{ k }}{% endfor %}
{% for k, v in d | dictsort %}{{ k }}={{ v }};{% endfor %}
d.items
e.nothing is defined
d['items']
l.append is defined
'hello wORLD it\\'s x-ray 3d'.title()
'hello wORLD it\\'s x-ray 3d' | title
'éCOLE'.capitalize() ~ 'ǆx'.capitalize() ~ ''.capitalize()
'éCOLE x' | capitalize
s | truncate(12)
s | truncate(12, true)
s | truncate(12, true, '..')
s | truncate(12, False, '…', 0)
s | truncate(length=9, killwords=true)
s | truncate
s | truncate(42)
s | truncate(2)
'aaaaaaaaaaaaaaaaaaaaaa' | truncate(10)
s | wordcount
"it's a_b-c 3.5 é" | wordcount
'' | wordcount
s | wordwrap(10)
s | wordwrap(10, false)
s | wordwrap(5)
s | wordwrap(5, true, '|')
long | wordwrap(8)
long | wordwrap(width=8, break_long_words=False, wrapstring='|')
long | wordwrap(8, break_on_hyphens=false)
s | wordwrap(10, break_on_hyphens=false)
'quick-brown fox--and-some semi - hyphen' | wordwrap(9)
'a  b   c    d' | wordwrap(4)
'' | wordwrap(4)
'x' | center(6)
'ab' | center(5)
'abc' | center(6)
'x' | center
5 | center(4)
'%s-%03d' | format('a', 7)
'%(a)s-%(b).2f' | format(a='x', b=1.5)
'%s' | format([1, 'a'])
'%r' | format('a')
'%x %X %o %e %g %5s|%-5s|%+d %%' | format(255, 255, 8, 12345.678, 0.0001, 'a', 'b', 3)
'%s %s' | format(1)
'%d' | format('a')
'%s' | format(none)
'%s %s' | format(true, 1.0)
{{ '%s' % none }}
'{} {}'.format(1, 'a')
'{0}-{1}-{0}'.format(1, 'a')
'{a:>5}|{b:.2f}|{c!r}'.format(a='x', b=1.5, c='q')
'{:05d} {:,} {:x} {:%}'.format(42, 1234567, 255, 0.5)
'{}'.format([1, 'a'])
'{}'.format(none)
e | xmlattr
{'class': 'a b', 'id': 5, 'none': none} | xmlattr
{'a': h} | xmlattr(false)
{'a b': 1} | xmlattr
h | forceescape
h | escape
h | e | e
h | forceescape | forceescape
(h | escape) ~ h
h | safe
h | striptags
e | pprint
l | pprint
s | pprint
{'k': s, 'l': [s, s], 'm': {'n': s}} | pprint
[1, [2, [3]], 'a'] | pprint
0 | filesizeformat
1 | filesizeformat
999 | filesizeformat
1000 | filesizeformat
13500 | filesizeformat
1024 | filesizeformat(true)
123456789 | filesizeformat
'2000' | filesizeformat
1e30 | filesizeformat
1.5 | filesizeformat
{% set j = joiner('|') %}{{ j() }}{{ j() }}{{ j() }}
{% set j = joiner() %}{{ j() }}a{{ j() }}b
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}
{% set c = cycler('a', 'b') %}{{ c.current }}{{ c.next() }}{{ c.current }}{{ c.reset() }}{{ c.next() }}
cycler()
lipsum(n=1) | length > 0
range(3) | list
range(5, 0, -2) | list
range(100001) | length
range(3)[1]
range(3) | length
dict(a=1, b='x')
dict({'a': 1}, b=2)
dict([('a', 1)])
dict()
{% set ns = namespace(a=1) %}{{ ns.a }}{% set ns.b = 2 %}{{ ns.b }}
{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}
{% set ns = namespace() %}{{ ns.x is defined }}
{{ namespace(a=1).b }}
l | sort
l | reverse | list
'abc' | reverse
l | map('string') | list
l | select('odd') | list
l | batch(2) | list
l | batch(2, 0) | list
l | slice(2) | list
l | sum
l | join(', ')
l | max ~ l | min
l | first ~ l | last
[1, 1, 2] | unique | list
[{'a': 1, 'b': 2}, {'a': 2, 'b': 3}] | map(attribute='b') | list
[{'a': 1}, {'b': 2}] | selectattr('a', 'defined') | list
{% for g, items in [{'a': 1, 'b': 2}, {'a': 1, 'b': 3}] | groupby('a') %}{{ g }}{{ items }}{% endfor %}
'a b' | urlencode
{'a': 'b c', 'd': 1} | urlencode
'x\\ny' | indent(2)
'x\\ny' | indent(2, true)
'x\\n\\ny' | indent(width=2, blank=true)
'3.7' | int
'x' | int(5)
'0x1f' | int(0, 16)
'3.7' | float
3.7 | round
3.75 | round(1)
3.2 | round(method='ceil')
3 | round
-3 | abs
'abc' | list
'abc' | length
none | default('x')
none | default('x', true)
undefined_name | default('x')
undefined_name
{{ undefined_name.attribute }}
'a' in 'abc'
1 in l
'x' in e
7 // 2 ~ ' ' ~ -7 // 2 ~ ' ' ~ 7 % 3 ~ ' ' ~ 2 ** 3 ~ ' ' ~ 7 / 2
2 ** -1
10 / 5
1 / 3
1e3
'a' * 3
[1] * 2
[1] + [2]
1 + true
'a' ~ 1 ~ none ~ true
s[0:3] ~ s[-3:] ~ s[::-1]
l[::-1]
l[5]
'abc'[1]
'abc'[5]
1 if false
(1 if false) is defined
'a' < 'b'
1 < 2 < 3
not none
[] or 'x'
l and 'y'
none is none
1.0 is integer
true is boolean
1 == 1.0
1 == true
'a' is in 'abc'
'A' is upper ~ 'a' is lower
3 is divisibleby 3
l is sequence
e is mapping
e | length
e | list
e | first
e | join(',')
e | tojson
e.keys() | tojson
(l[1:] + [5]) | tojson
e | string
true | string
1.50 | string
s.split() | length
s.split(',')
'a,b,,c'.split(',', 1)
'  a  b '.split()
'a\\nb\\r\\nc'.splitlines()
'a\\nb\\n'.splitlines(true)
'ab'.startswith(('x', 'a'))
'ab'.endswith('b')
'abab'.replace('a', 'x', 1)
'abab' | replace('a', 'x')
'abab' | replace('a', 'x', 1)
', '.join(['a', 'b'])
', '.join([1])
'a-b'.isalnum() ~ 'ab1'.isalnum() ~ '12'.isdigit() ~ 'Ab'.isupper()
e.get('x') ~ e.get('z') ~ e.get('z', 5)
e.pop('x')
e.update({'z': 1})
l.append(4)
l.index(1) ~ l.count(1)
'é'.encode('utf-8')
'ab'.expandtabs()
'a\\tb'.expandtabs(4)
'a{x}'.format_map({'x': 1})
'%c' | format(65)
'abc'.translate({97: 'x'})
'Hello'.istitle()
'abc'.isidentifier()
{{ [1, 2, 3] | random is number }}
{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}
{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, x=2) }}
{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{% endcall %}
{% set x %}a{{ 1 }}{% endset %}{{ x }}
{% filter upper %}abc{% endfilter %}
{% for i in l %}{{ loop.index }}{{ loop.first }}{{ loop.previtem }}{{ loop.revindex }};{% endfor %}
{% for i in l %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i) }}{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %}
{% for i in l recursive %}{{ i }}{% endfor %}
{% for i in l if i > 1 %}{{ i }}{{ loop.length }}{% endfor %}
{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }}{% endfor %}
{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% set a, b = (1, 2) %}{{ (a, b) }}
{% do l.append(1) %}
{{ 'a' 'b' }}
{{ "a\\tb\\u00e9\\x41" }}
{{ 1_000 }}
{{ [1, 2,] }}
{{ {'a': 1}.a }}
{{ {1: 2}[1] }}
{{ l.0 }}
{{ not (1, ) }}
{{ l | sort(reverse=true) }}
{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') }}
{{ ['b', 'A'] | sort }}
{{ ['b', 'A'] | sort(case_sensitive=true) }}
{{ 'x' if 1 else 'y' }}
{{ none + 1 }}
{{ 'a' + 1 }}
{{ 'a' ~ [1] }}
{{ [none, true, 1.0, 'x'] }}
{{ [undefined_name] }}
""".strip("\n").split("\n")


def make_all(path: Path) -> None:
    """Writes the variables, and each template with its `text`, or null if it has none."""
    templates = map(as_template, EXPRESSIONS)
    renderings = [{"template": template, "text": render(template)} for template in templates]
    contents = {"variables": VARIABLES, "renderings": renderings}
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def as_template(expression: str) -> str:
    expression = expression.replace("\\\\", "\\")
    return expression if expression.startswith("{{ ") or "{%" in expression else f"{{{{ {expression} }}}}"


def render(template: str):
    try:
        variables = json.loads(json.dumps(VARIABLES))
        text = chat_template_utils._compile_jinja_template(template).render(**variables)
    except Exception:
        return None
    # An address in the memory of Python has no meaning.
    return None if " at 0x" in text else text


if __name__ == "__main__":
    make_all(Path(__file__).resolve().parent.parent / "golden" / "chat" / "expressions.json")
