"""Writes golden.json: what Jinja2 makes of the templates here, in the environment in which transformers
runs a chat template (`_compile_jinja_template` in its chat_template_utils.py, version 5.24).

    pip install jinja2==3.1.6
    TZ=UTC python3 make.py

The templates were written for this purpose. They say what they say in the way of published ones:
their loops, filters, tests and white space.
"""

import json
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent
NOW = 1_700_000_000  # 2023-11-14 22:13:20 UTC


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: transformers' own notes where the text is; what is written stays."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.fromtimestamp(NOW, timezone.utc).strftime(form)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, id="call00001"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


PLAIN = [say("user", " Where is the red circle?\n"), say("assistant", " Row 3. "), say("user", "And \"ünï\" <b>?")]
CHATS = {
    "one": [say("user", "Hi")],
    "plain": PLAIN,
    "system": [say("system", "Be short.  "), *PLAIN],
    "answered": PLAIN[:2],
    "twice": [say("user", "a"), say("user", "b")],
    "thought": [
        say("user", "a"),
        say("assistant", "<think>\nhm\n</think>\n\nb"),
        say("user", "c"),
        say("assistant", "<think>\nso\n</think>\n\nd"),
    ],
    "reasoned": [say("user", "a"), say("assistant", "b", reasoning_content="\nhm\n")],
}
PICTURES = {
    "picture": [say("user", [{"type": "image"}, {"type": "text", "text": "What is this?"}])],
    "two": [
        say("system", [{"type": "text", "text": "Be short."}]),
        say("user", [{"type": "text", "text": "Compare "}, {"type": "image"}, {"type": "image"}]),
        say("assistant", [{"type": "text", "text": "Same."}]),
        say("user", [{"type": "text", "text": "Sure?"}]),
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather of a \"place\".",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Where, as in Köln"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "limit": {"type": ["number", "null"], "default": 0.5},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}},
]
CALLS = {
    "asked": [say("system", "Use tools."), say("user", "Weather?")],
    "called": [
        say("user", "Weather?"),
        {"role": "assistant", "tool_calls": [call("weather", {"place": "Köln", "days": [1, 2], "deep": {"a": None, "b": 1.50}})]},
        say("tool", '{"sky": "blue"}', tool_call_id="call00001", name="weather"),
    ],
    "went on": [
        say("user", "Weather?"),
        {"role": "assistant", "content": "", "tool_calls": [call("weather", {"place": "Bonn"}), call("now", {}, "call00002")]},
        say("tool", "dry", tool_call_id="call00001"),
        say("tool", "noon", tool_call_id="call00002"),
        say("assistant", "Dry at noon."),
        say("user", "Thanks"),
    ],
    "as text": [
        say("user", "Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call("weather", '{"place": "Bonn"}'), call("now", "{}", "call00002")]},
        say("tool", "dry", tool_call_id="call00001"),
    ],
}
ODD = {
    "odd": [say("user", "banana"), say("skip", "x"), say("assistant", ""), say("stop", "y"), say("user", "z")],
    "none": [],
}


def cases():
    for template, chats in [
        ("chatml", CHATS), ("phi3", CHATS), ("llama3", CHATS), ("gemma", CHATS), ("mistral", CHATS),
        ("smollm2", CHATS), ("thinking", CHATS), ("deepseek", CHATS), ("qwen2_vl", CHATS), ("qwen2_vl", PICTURES),
        ("smolvlm", PICTURES), ("qwen2_tools", CHATS),
    ]:
        for name, messages in chats.items():
            for open_answer in (False, True):
                yield template, name, messages, None, {}, open_answer
    for template in ("llama3", "mistral", "qwen2_tools", "deepseek"):
        for name, messages in CALLS.items():
            for tools in (None, TOOLS):
                yield template, name, messages, tools, {}, True
    yield "qwen2_vl", "numbered", PICTURES["two"], None, {"add_vision_id": True}, True
    yield "thinking", "no thoughts", PLAIN, None, {"enable_thinking": False}, True
    yield "thinking", "thoughts", PLAIN, None, {"enable_thinking": True}, True
    yield "llama3", "dated", PLAIN, None, {"date_string": "1 May"}, True
    yield "llama3", "custom", PLAIN, None, {"custom_tools": TOOLS[1:]}, True
    for name, messages in ODD.items():
        yield "language", name, messages, TOOLS, {}, True
        yield "language", name, messages, None, {}, True


def main():
    env = environment()
    made = []
    for template, name, messages, tools, kwargs, open_answer in cases():
        compiled = env.from_string((HERE / f"{template}.jinja").read_text())
        case = {"template": template, "name": name, "messages": messages, "tools": tools, "kwargs": kwargs,
                "add_generation_prompt": open_answer}
        given = {"bos_token": "<s>", "eos_token": "</s>", **kwargs}
        try:
            case["text"] = compiled.render(messages=messages, tools=tools, documents=None,
                                           add_generation_prompt=open_answer, **given)
        except jinja2.exceptions.UndefinedError:
            case["error"] = ""
        except jinja2.exceptions.TemplateError as error:
            case["error"] = str(error)
        except TypeError:
            case["error"] = ""
        made.append(case)
    golden = {"jinja2": jinja2.__version__, "now": NOW, "cases": made}
    (HERE / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


main()
