"""An evaluation in a GGUF file: written, read back, replaced; and nothing else in the file changes."""

import pytest
from gguf import GGUFReader
from ropewalk import UserError
from ropewalk.container import (
    EVALUATION,
    Certificate,
    certificate_of,
    embedded_schedule,
    model_digest,
    native_schedule,
    read_header,
    schedule_digest,
    schedule_of,
    uncertified_digest,
)
from ropewalk.convert import certify, check_certifiable, embed_schedule
from ropewalk.factors import extend


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("certify") / "plain.gguf", context_length=512)


@pytest.fixture
def model(plain, tmp_path):
    path = tmp_path / "long.gguf"
    embed_schedule(plain, path, extend(native_schedule(read_header(plain)), 2048))
    return path


def certificate(path, **changes):
    facts = {
        "suite": "ruler",
        "suite_version": 1,
        "ropewalk": "0.1.0",
        "texts_digest": "00ff",
        "schedule_digest": schedule_digest(schedule_of(read_header(path))),
        "kv_type": "q8_0:f16",
        "seed": -3,
        "samples": 50,
        "share": 10,
        "chat": True,
        "original_context": 512,
        "effective_by_accuracy": 1024,
        "lengths": (512, 1024),
        "tasks": ("vt", "cwe", "Wörter"),
        "accuracy": (0.5, 1 / 3),
        "accuracy_low": (0.25, 0.0),
        "accuracy_high": (0.75, 1.0),
        "loss": (1.0, 2.5),
        "loss_low": (0.5, 2.0),
        "loss_high": (1.5, 3.0),
        "task_accuracy": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        "task_loss": (1.0, 2.0, 3.0, 4.0, 5.0, 6.1),
    }
    return Certificate(**{**facts, **changes})


def contents(path):
    reader = GGUFReader(path)
    fields = {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", EVALUATION))
    }
    return fields, [(t.name, int(t.tensor_type), tuple(map(int, t.shape)), t.data.tobytes()) for t in reader.tensors]


def test_round_trip_and_nothing_else_changes(model):
    before, schedule, digest = contents(model), schedule_of(read_header(model)), uncertified_digest(model)
    whole = model_digest(model)
    model.chmod(0o640)
    assert certificate_of(read_header(model)) is None
    steps = []
    certify(model, certificate(model), on_progress=lambda done, total: steps.append((done, total)))
    header = read_header(model)
    assert certificate_of(header) == certificate(model) and certificate_of(header).holds_for(schedule)
    assert contents(model) == before and embedded_schedule(header) == schedule
    assert uncertified_digest(model) == digest and model_digest(model) != whole
    assert model.stat().st_mode & 0o777 == 0o640 and list(model.parent.iterdir()) == [model]
    assert steps[-1] == (model.stat().st_size,) * 2
    again = certificate(model, effective_by_accuracy=None, effective_by_likelihood=512, seed=1)
    certify(model, again)  # in place of the other one
    assert certificate_of(read_header(model)) == again and contents(model) == before


def test_a_model_without_a_schedule_of_ours(plain, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(plain.read_bytes())
    certify(path, certificate(path))
    header = read_header(path)
    assert embedded_schedule(header) is None and schedule_of(header) == native_schedule(header)
    assert certificate_of(header).holds_for(schedule_of(header))


def test_another_schedule_is_not_that_which_was_evaluated(model, plain, tmp_path):
    certify(model, certificate(model))
    native = native_schedule(read_header(plain))
    assert not certificate_of(read_header(model)).holds_for(extend(native, 2048, "ntk"))
    other = tmp_path / "other.gguf"
    embed_schedule(model, other, extend(native, 2048, "ntk"))  # drops what does not hold for it
    assert certificate_of(read_header(other)) is None


def test_what_differs_in_another_model(model, plain, tmp_path):
    digest = uncertified_digest(model)
    data = bytearray(model.read_bytes())
    data[-40] ^= 1
    (tmp_path / "weights.gguf").write_bytes(data)
    assert uncertified_digest(tmp_path / "weights.gguf") != digest != uncertified_digest(plain)


def test_files_that_are_not_replaced(model, tmp_path):
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    with pytest.raises(UserError, match="is a link, expected the model's own"):
        certify(link, certificate(model))
    blob = tmp_path / "sha256-00"
    blob.write_bytes(model.read_bytes())
    with pytest.raises(UserError, match="has another name, expected the model's own"):
        check_certifiable(blob)
    assert certificate_of(read_header(model)) is None


def test_a_broken_certificate_names_its_key(model):
    certify(model, certificate(model).model_copy(update={"accuracy": (2.0, 0.1)}))
    with pytest.raises(UserError, match=r"long.gguf: ropewalk.evaluation metadata: accuracy.0: Input should be less"):
        certificate_of(read_header(model))
    certify(model, certificate(model).model_copy(update={"loss": (2.0,)}))
    with pytest.raises(UserError, match="loss: 1 numbers, expected 2"):
        certificate_of(read_header(model))
    assert schedule_of(read_header(model)).context == 2048  # the model runs all the same
