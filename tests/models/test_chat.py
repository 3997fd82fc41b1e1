import json

import pytest

from kvjax.models.chat import render
from kvjax.models.tokenizer import Tokenizer


def test_what_templates_commonly_use():
    template = """
{%- for m in messages -%}
    {%- if loop.index0 > 3 %}{% break %}{% endif -%}
    {% generation %}{{ m | tojson }}{% endgeneration %}
{% endfor -%}
{{ strftime_now("%Y") | length }}{{ bos_token }}"""
    messages = [{"role": "user", "content": "é"}] * 6
    found = render(template, messages=messages, bos_token="<s>")
    # Four messages, then break; the line break after a block is trimmed.
    assert found == json.dumps(messages[0], ensure_ascii=False) * 4 + "4<s>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__code__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ '%s' | format('x' * 999999999) }}",
        "{{ 'x' * 9999999999 }}",
        "{{ [0] * 9999999999 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ range(999999999) | list }}",
        "{{ '{0.__class__}'.format(1).x.y }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ open('/etc/passwd') }}",
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ],
)
def test_templates_reach_nothing(template):
    with pytest.raises(ValueError, match="chat template failed"):
        render(template, messages=[])


def test_messages_stay_as_they_were():
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match="chat template failed"):
        render("{{ messages[0].update(role='system') }}", messages=messages)
    assert messages == [{"role": "user", "content": "x"}]


def test_no_template(byte_level):
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer(byte_level).chat([{"role": "user", "content": "x"}])
