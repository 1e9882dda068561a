"""OpenAI's own Python package against `hae serve` with the built-in model: what programs that were written for
OpenAI's services do. `cargo xtask serve clients` starts the server and runs this; HAE_URL says where it is."""

import base64
import json
import os
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
URL = os.environ["HAE_URL"] + "/v1"
PICTURE = "data:image/png;base64," + base64.b64encode((ROOT / "models/demo.png").read_bytes()).decode()
QUESTION = "Where is the red triangle?"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client():
    with openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=100) as client:
        yield client


def shown(text=QUESTION):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": PICTURE}},
                {"type": "text", "text": text},
            ],
        }
    ]


def asked(text="Hello"):
    return [{"role": "user", "content": text}]


def test_the_model_is_listed(client):
    models = client.models.list().data
    assert len(models) == 1 and models[0].object == "model"


def test_a_chat_about_a_picture(client):
    answer = client.chat.completions.create(model="any", messages=shown(), max_tokens=24, temperature=0)
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content.strip()
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # The picture is some hundreds of tokens, and fields of hae's own are there for who wants them.
    assert answer.usage.prompt_tokens > 100
    assert answer.hae["cells"]


def test_a_stream_says_the_same(client):
    whole = client.chat.completions.create(model="any", messages=shown(), max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model="any",
        messages=shown(),
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reasons, usage, ids = "", [], None, set()
    for piece in stream:
        ids.add(piece.id)
        usage = piece.usage or usage
        for choice in piece.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason] and len(ids) == 1
    assert usage.completion_tokens == whole.usage.completion_tokens
    # What a slot holds of a prompt is not computed again.
    assert usage.prompt_tokens_details.cached_tokens > 0


def test_the_packages_own_way_of_streaming(client):
    with client.chat.completions.stream(model="any", messages=shown(), max_tokens=24, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert final.choices[0].message.content.strip()


def test_several_answers(client):
    answer = client.chat.completions.create(
        model="any", messages=asked(), max_tokens=4, n=3, temperature=1.5, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    stream = client.chat.completions.create(
        model="any", messages=asked(), max_tokens=4, n=3, temperature=1.5, seed=1, stream=True
    )
    texts = ["", "", ""]
    for piece in stream:
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]


def test_a_seed_repeats_an_answer(client):
    def answer(seed):
        made = client.chat.completions.create(
            model="any", messages=asked(), max_tokens=12, temperature=2, seed=seed, extra_body={"ignore_eos": True}
        )
        return made.choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_probabilities(client):
    answer = client.chat.completions.create(
        model="any", messages=shown(), max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        # Greedily the likeliest one is taken.
        assert token.top_logprobs[0].token == token.token
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content


def test_a_text_that_ends_the_answer(client):
    whole = client.chat.completions.create(model="any", messages=shown(), max_tokens=24, temperature=0)
    text = whole.choices[0].message.content
    stop = text.split()[1]
    cut = client.chat.completions.create(model="any", messages=shown(), max_tokens=24, temperature=0, stop=stop)
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_an_answer_in_a_form(client):
    schema = {
        "type": "object",
        "properties": {"row": {"type": "integer", "minimum": 1, "maximum": 9}, "red": {"type": "boolean"}},
        "required": ["row", "red"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="any",
        messages=shown(),
        max_tokens=400,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}},
    )
    value = json.loads(answer.choices[0].message.content)
    assert set(value) == {"row", "red"} and 1 <= value["row"] <= 9 and isinstance(value["red"], bool)


def test_a_class_as_the_form(client):
    from pydantic import BaseModel

    class Place(BaseModel):
        red: bool
        corner: bool

    answer = client.chat.completions.parse(model="any", messages=shown(), max_tokens=400, response_format=Place)
    assert isinstance(answer.choices[0].message.parsed, Place)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool(client, stream):
    how = dict(model="any", messages=asked("The weather in Rome?"), tools=[WEATHER], max_tokens=400)
    how["tool_choice"] = {"type": "function", "function": {"name": "weather"}}
    if stream:
        calls, reason = {}, None
        for piece in client.chat.completions.create(stream=True, **how):
            for choice in piece.choices:
                reason = choice.finish_reason or reason
                for part in choice.delta.tool_calls or []:
                    call = calls.setdefault(part.index, {"name": "", "arguments": ""})
                    call["name"] += part.function.name or ""
                    call["arguments"] += part.function.arguments or ""
        calls = list(calls.values())
    else:
        choice = client.chat.completions.create(**how).choices[0]
        reason = choice.finish_reason
        calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in choice.message.tool_calls]
    assert [call["name"] for call in calls] == ["weather"] and reason == "tool_calls"
    assert json.loads(calls[0]["arguments"])["town"] in ("Rome", "Oslo")


def test_what_came_of_a_call_goes_back(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome"}'}}
    answer = client.chat.completions.create(
        model="any",
        messages=[
            *asked("The weather in Rome?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
        ],
        tools=[WEATHER],
        max_tokens=8,
    )
    assert answer.choices[0].message.role == "assistant"


def test_completions_of_texts(client):
    answer = client.completions.create(model="any", prompt=["The red", "The blue"], max_tokens=4, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
    pieces = list(client.completions.create(model="any", prompt="The red", max_tokens=4, stream=True))
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")


def test_the_newer_shape(client):
    answer = client.responses.create(
        model="any",
        instructions="Be short.",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
                    {"type": "input_text", "text": QUESTION},
                ],
            }
        ],
        max_output_tokens=24,
        temperature=0,
    )
    assert answer.output_text.strip() and answer.usage.input_tokens > 100
    assert answer.status in ("completed", "incomplete")


def test_the_newer_shape_in_pieces(client):
    text, last, numbers = "", None, []
    stream = client.responses.create(model="any", input="Hello", max_output_tokens=8, temperature=0, stream=True)
    for event in stream:
        numbers.append(event.sequence_number)
        text += event.delta if event.type == "response.output_text.delta" else ""
        last = event
    assert numbers == list(range(len(numbers)))
    assert last.type == "response.completed" and last.response.output_text == text


def test_the_newer_shape_calls_tools(client):
    answer = client.responses.create(
        model="any",
        input="The weather in Oslo?",
        tools=[{"type": "function", **WEATHER["function"], "strict": True}],
        tool_choice="required",
        max_output_tokens=400,
    )
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["weather"]
    assert json.loads(calls[0].arguments)["town"] in ("Rome", "Oslo")


def test_the_newer_shape_counts_tokens(client):
    counted = client.responses.input_tokens.count(model="any", input="Hello")
    answer = client.responses.create(model="any", input="Hello", max_output_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens


def test_mistakes_are_of_the_packages_classes(client):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="any", messages=asked(), temperature=-5000.0, top_p=7)
    assert "top_p" in str(wrong.value) and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="any", messages=[])
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="any", messages=asked("word " * 20000))
    assert long.value.type == "exceed_context_size_error"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="x")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="any",
            messages=asked(),
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "none"}}},
        )


def test_a_stream_that_is_left_frees_its_slot(client):
    stream = client.chat.completions.create(
        model="any", messages=asked(), stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    slots = None
    for _ in range(100):
        slots = client.get("/../slots", cast_to=list[dict])
        if not any(slot["is_processing"] for slot in slots):
            return
    pytest.fail(f"a slot goes on: {slots}")


def test_the_asynchronous_client():
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=URL, api_key="none", timeout=100) as client:
            asks = [client.chat.completions.create(model="any", messages=asked(), max_tokens=4) for _ in range(6)]
            return await asyncio.gather(*asks)

    assert all(answer.choices[0].message.role == "assistant" for answer in asyncio.run(ask()))
