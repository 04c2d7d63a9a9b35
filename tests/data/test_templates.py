"""Chat templates: every text and image once, as the processor writes them, or one line that names the template."""

from __future__ import annotations

import json
import shutil

import pytest

from rethinker import cli
from rethinker.config import ConfigError, DataConfig, EnvironmentConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.environments.tools import schemas
from rethinker.policy.loading import load_processor
from rethinker.runtime.distributed import ALONE
from rethinker.samples import Query
from tests.data.encoders import IMAGE, LIMITS, QUESTIONS, as_bytes, picture, reference


def template(content: str = "{{ part['text'] }}", image: str = IMAGE, system: str = "", before: str = "") -> str:
    """A chat template that writes a message's texts and images so, and does this when it meets a system message."""
    return (
        "{% for message in messages %}{% if message['role'] == 'system' %}" + system + "{% endif %}"
        "<|im_start|>{{ message['role'] }}\n" + before + "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}" + content + "{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


WHOLE = (
    """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% set ns = namespace(text='') %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"""
    + IMAGE
)
WHOLE += """{% else %}{% set ns.text = ns.text + part['text'] %}{% endif %}{% endfor %}{{ ns.text | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

OTHER_TEMPLATES = {
    "trims every text": template("{{ part['text'] | trim }}"),
    "trims the left side": template("{{ part['text'].lstrip() }}"),
    "trims the right side": template(" {{ part['text'].rstrip() }} "),
    "has white space of its own": template(" \n{{ part['text'] }}\n "),
    "writes images first and trims all text as one": WHOLE,
    "a line break after an image": template(image=IMAGE + "\n"),
}


@pytest.mark.parametrize("system", [None, " Answer briefly. \n"])
@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_prompts_of_other_templates_equal_the_processors(make, name, system):
    """Also where the template trims what a message says, or puts it elsewhere."""
    encoder = make(prompt=" \n{question}\n\u2003", system=system, chat_template=OTHER_TEMPLATES[name])
    for number, (question, count) in enumerate(QUESTIONS):
        images = [picture(64, 64, seed=i) for i in range(count)]
        query = Query(str(number), question, "", tuple(as_bytes(image) for image in images))
        expected = reference(encoder, query, images, system)["input_ids"][0].tolist()
        assert encoder.encode(query).token_ids == expected, question


UNFIT = {
    "writes the parts of a message as a list": "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}",
    "writes them as JSON": "{% for m in messages %}<|im_start|>{{ m['content'] | tojson }}{% endfor %}",
    "leaves texts out": template(""),
    "writes texts twice": template("{{ part['text'] }} {{ part['text'] }}"),
    "changes case": template("{{ part['text'] | lower }}"),
    "escapes": template("{{ part['text'] | e }}"),
    "joins lines": template("{{ part['text'].split() | join(' ') }}"),
    "takes line breaks alone": template("{{ part['text'].strip('\n') }}"),
    "takes a text for a message": "{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}",
    "raises": template(before="{{ raise_exception('no\nway') }}"),
    "is no template": "{% for message in",
}


@pytest.mark.parametrize("name", UNFIT)
def test_templates_that_change_texts_are_refused(make, name):
    """When the encoder is made, in one line that names the chat template and what would do."""
    with pytest.raises(ConfigError, match=r"^policy\.model: its chat template .*; a chat template must write") as error:
        make(chat_template=UNFIT[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("image", "shown"), [("", 0), (2 * IMAGE, 4), ("<image>", 0)])
def test_templates_that_do_not_show_images_are_refused(make, image, shown):
    """At the first question with images; questions without any train."""
    encoder = make(chat_template=template(image=image))
    assert encoder.encode(Query("text", "q", "", ())).token_ids
    for ask in (encoder.encode, encoder.misfit, lambda query: encoder.check([query])):
        with pytest.raises(ConfigError, match=rf"its chat template writes {shown} image placeholders for 2 images;"):
            ask(Query("q", "q", "", (as_bytes(picture(64, 64)), as_bytes(picture(64, 64, 1)))))


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", r"takes no system message \(.*role not supported\)"),
        ("{% continue %}", "does not write a system message once"),
        ("{{ message['content'][0]['text'] }}", "does not write a system message once"),
    ],
)
def test_templates_without_a_system_message(make, system, words):
    """data.system is named with what to do; without it the model trains."""
    with pytest.raises(
        ConfigError, match=rf"^data\.system='Be brief\.': .*{words}.*; set data\.system to null"
    ) as error:
        make(system="Be brief.", chat_template=template(system=system))
    assert "\n" not in str(error.value)
    assert make(chat_template=template(system=system)).encode(Query("q", "q", "", ())).token_ids


def test_templates_that_depend_on_what_is_said_are_refused(make):
    """The first prompts of every layout are compared with the processor's own; texts that spell special tokens, which
    the processor takes for these, are not."""
    odd = template("{{ part['text'] if 'red' not in part['text'] else 'RED' }}")
    encoder, image = make(chat_template=odd, prompt="{question}"), (as_bytes(picture(64, 64)),)
    with pytest.raises(ConfigError, match=r"its processor reads query a as .*RED.* there is .*red <.* here") as error:
        encoder.encode(Query("a", "red <", "", ()))
    assert "\n" not in str(error.value)
    encoder = make(chat_template=odd, prompt="{question}")
    encoder.encode(Query("b", "red <|im_end|>", "", ()))
    for name in "cde":
        encoder.encode(Query(name, "blue", "", ()))
    with pytest.raises(ConfigError, match="query f"):  # the first one with an image
        encoder.encode(Query("f", "red", "", image))
    encoder = make(chat_template=WHOLE, prompt="{question}")
    for name in "ghi":
        encoder.encode(Query(name, "<image> a <image> b", "", 2 * image))
    with pytest.raises(ConfigError, match="query j"):  # all of it is trimmed, and the first text is blank
        encoder.encode(Query("j", "<image> <image> b", "", 2 * image))
    wrong = template("{{ part['text'] if 'red' not in part['text'] else raise_exception('r') }}")
    with pytest.raises(ConfigError, match=r"^policy\.model: its processor cannot read query g: TemplateError: r$"):
        make(chat_template=wrong).encode(Query("g", "red", "", ()))


def test_a_template_of_the_tokenizer_alone(folder, tmp_path):
    """It is the processor's, too, also when that is saved; a model without any is refused in one line."""
    alone = shutil.copytree(folder, tmp_path / "alone")
    text = (alone / "chat_template.jinja").read_text()
    (alone / "chat_template.jinja").unlink()
    with pytest.raises(
        ConfigError, match=r"^policy\.model=.* has no chat template; put its chat_template\.jinja"
    ) as error:
        load_processor(alone)
    assert "\n" not in str(error.value)
    settings = json.loads((alone / "tokenizer_config.json").read_text())
    (alone / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": text}))
    query, images = Query("q", "q", "", (as_bytes(picture(64, 64)),)), [picture(64, 64)]
    usual = PromptEncoder(load_processor(folder), DataConfig(**LIMITS)).encode(query).token_ids
    encoder = PromptEncoder(load_processor(alone), DataConfig(**LIMITS))
    assert encoder.encode(query).token_ids == reference(encoder, query, images)["input_ids"][0].tolist() == usual
    encoder.processor.save_pretrained(tmp_path / "saved")
    assert load_processor(tmp_path / "saved").chat_template == text


@pytest.mark.parametrize("command", ["train", "eval", "curate"])
def test_a_template_is_refused_before_a_model_is_loaded(folder, tmp_path, command, monkeypatch, capsys):
    """By every command, at its first questions: here a template that changes what is asked."""
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template("{{ part['text'].split('?')[0] }}"))
    for loader in ("run.PolicyEngine", "evaluation.evaluate.open_model", "evaluation.answering.open_model"):
        monkeypatch.setattr(f"rethinker.{loader}", lambda *_: pytest.fail("a model was loaded"))
    # This process may hold a vLLM engine of other tests, whose process group a run would end.
    monkeypatch.setattr("rethinker.runtime.distributed.start", lambda timeout_s: ALONE)
    monkeypatch.setattr("rethinker.runtime.distributed.stop", lambda: None)
    recipe, output = ["easy_vqa_cpu", "--policy.model", str(model)], ["--output", str(tmp_path / "output")]
    arguments = {
        "train": [*recipe, "--run.dir", str(tmp_path), "--run.name", "x", "--data.validation", "null"],
        "eval": [str(model), "--benchmark", "easy_vqa", *output],
        "curate": [*recipe, *output],
    }[command]
    assert cli.main([command, *arguments]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert line.startswith("error: policy.model: its processor reads query ")


THINKS = template().replace("assistant\n", "assistant\n{% if enable_thinking is not false %}<think>\n{% endif %}")


@pytest.mark.parametrize("thinks", [True, False, None])
def test_what_a_template_lets_one_choose(make, thinks):
    """data.chat_template_kwargs reaches the template, and the comparison with the processor's own prompts."""
    chosen = {} if thinks is None else {"enable_thinking": thinks}
    encoder = make(chat_template=THINKS, chat_template_kwargs=chosen)
    query = Query("q", "2 + 2?", "")
    ids = encoder.encode(query).token_ids
    assert ids == reference(encoder, query, [], **chosen)["input_ids"][0].tolist()
    assert encoder.decode(ids).endswith("<think>\n") == (thinks is not False)


OTHERS = ("enable_thinkin", "messages", "add_generation_prompt", "tools", "thinking", "role", "message")
OTHERS += ("bos_token", "namespace")


@pytest.mark.parametrize("name", OTHERS)
def test_choices_that_a_template_does_not_have(make, name):
    """A template would ignore them, or they are not the user's."""
    template = "{# thinking #}{% set n = namespace() %}{{ bos_token }}" + THINKS
    message = f"^data.chat_template_kwargs: .* has no choice '{name}'; it has enable_thinking$"
    with pytest.raises(ConfigError, match=message):
        make(chat_template=template, chat_template_kwargs={name: True})


TOOLS = schemas(EnvironmentConfig(use=["crop", "python"]))


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_a_template_that_knows_of_tools_tells_of_them(make, system):
    """The prompt is the processor's own with the same tools, and an answer's is not longer for them."""
    knowing = (
        "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    )
    encoder = make(system=system, chat_template=knowing + template())
    encoder = PromptEncoder(encoder.processor, encoder.config, TOOLS)
    query = Query("q", "what is it?", "", (as_bytes(picture(64, 64)),))
    prompt = encoder.encode(query)  # compared with the processor's
    text = encoder.decode(prompt.token_ids, special=True)
    assert "tools\n" in text and text.count('"name": "crop"') == text.count('"name": "python"') == 1
    assert "# Tools" not in text
    answer = encoder.decode(encoder.observation("so", (), "q").token_ids, special=True)
    assert answer == "<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_other_templates_tell_of_tools_in_the_system_message(make, system):
    """In Qwen's words, behind the user's own message or Qwen's."""
    encoder = make(system=system)
    encoder = PromptEncoder(encoder.processor, encoder.config, TOOLS)
    text = encoder.decode(encoder.encode(Query("q", "what is it?", "")).token_ids, special=True)
    begin = f"<|im_start|>system\n{system or 'You are a helpful assistant.'}\n\n# Tools\n\nYou may call"
    assert text.startswith(begin) and text.count("<|im_start|>system") == 1
    assert [json.loads(line) for line in text.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")] == TOOLS


def test_a_template_that_can_tell_of_no_tools_is_named(make):
    """It takes no system message."""
    processor = make().processor
    processor.chat_template = template(system="{{ raise_exception('no system message') }}")
    with pytest.raises(ConfigError, match="environment.describe=true.*set it to false"):
        PromptEncoder(processor, DataConfig(**LIMITS), TOOLS)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("in messages %}", "in messages if message['role'] != 'assistant' %}", "leaves out the assistant"),
        ("<|im_end|>", "{% if message['role'] == 'assistant' %}.{% endif %}<|im_end|>", "no special token behind"),
        ("in messages %}", "in messages[-1:] %}", "leaves out the assistant"),
    ],
)
def test_a_template_without_turns_is_named(make, old, new, what):
    """As soon as an answer is to be written: the policy would read something else than it was trained with."""
    processor = make().processor
    processor.chat_template = template().replace(old, new, 1)
    encoder = PromptEncoder(processor, DataConfig(**LIMITS))
    with pytest.raises(ConfigError, match=f"policy.model: its chat template .*{what}"):
        encoder.observation("so", (), "q")
