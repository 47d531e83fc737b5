"Word lists: words of texts, counts, files, parts of speech, templates, and refusals."

import sys
from types import SimpleNamespace

import pytest

from aligned_mllm.core import InputError
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records, write_records
from aligned_mllm.teachers.joint_space import tiny_joint_space
from aligned_mllm.teachers.words import (
    VISIBLE,
    WordList,
    corpus_words,
    in_template,
    require_encodable,
    stop_words,
    tagged_words,
    text_words,
    texts_in,
    unencodable,
    word_file,
)

CAPTIONS = [
    "A red dog, and a red-brick wall.",
    "The dog's wall is red; two dogs",
    "Über-Café mit Hund: 3 CAFÉS",
]


def written(path, count=2):
    "A file of records, each with two turns."
    turns = (Turn("<image>\ndescribe", "a red dog"), Turn("what is above", "the wall"))
    write_records([Record(f"{n}", ("a.png",), turns) for n in range(count)], path)
    return path


@pytest.mark.parametrize(
    "text, words",
    [
        (CAPTIONS[0], ["red", "dog", "and", "red-brick", "wall"]),
        (CAPTIONS[1], ["the", "dog", "wall", "is", "red", "two", "dogs"]),
        (CAPTIONS[2], ["über-café", "mit", "hund", "cafés"]),
        ("e\u0301te\u0301 x_ray 4x4 -- T-", ["été", "ray"]),
        ("", []),
    ],
)
def test_words_of_a_text(text, words):
    assert text_words(text) == words


def test_case_is_kept_on_request():
    assert text_words("Red dog", lower=False) == ["Red", "dog"]
    words = corpus_words(["The Dog", "the dog", "THE dog"], lower=False)
    assert words.words == ("dog", "Dog") and words.counts == (2, 1)  # stop words in any case


def test_a_corpus_is_counted_and_ordered():
    words = corpus_words(CAPTIONS)
    assert words.words[:3] == ("dog", "red", "wall") and words.counts[:3] == (2, 2, 2)
    assert "two" in words.words and "the" not in words.words and "is" not in words.words
    assert corpus_words(CAPTIONS, least=2).words == ("dog", "red", "wall")
    assert corpus_words(CAPTIONS, most=1).words == ("dog",)
    assert "the" in corpus_words(CAPTIONS, stop=()).words
    assert corpus_words(CAPTIONS).digest == corpus_words(list(CAPTIONS)).digest


def test_stop_words_are_not_those_that_pictures_show():
    assert {"fire", "two", "bottom", "above"} <= VISIBLE
    assert {"the", "of", "is", "and"} <= stop_words() and not VISIBLE & stop_words()


def test_records_a_file_and_a_folder_give_the_same(tmp_path):
    path = written(tmp_path / "captions.jsonl")
    written(tmp_path / "train.jsonl", 1)
    wanted = ["a red dog", "the wall"] * 2
    assert list(texts_in(Records(path, check_images=False))) == wanted
    assert list(texts_in(path)) == list(texts_in(str(tmp_path))) == wanted
    assert corpus_words(path).counts == (2, 2, 2)


def test_lists_are_joined_saved_and_read(tmp_path):
    both = WordList(("b", "a"), (1, 2)).joined(WordList(("c", "a"), (5, 5)))
    assert (both.words, both.counts) == (("b", "a", "c"), (1, 7, 5))
    both.save(tmp_path / "words.txt")
    assert word_file(tmp_path / "words.txt") == both
    assert (tmp_path / "words.txt").read_bytes() == b"b\t1\na\t7\nc\t5\n"
    (tmp_path / "other.txt").write_bytes("\ufeffZebra\r\n hot  dog \r\n\r\nzebra\r\nthe\r\n".encode())
    assert word_file(tmp_path / "other.txt", stop=["the"]).words == ("zebra", "hot dog")
    assert word_file(tmp_path / "other.txt", lower=False).words == ("Zebra", "hot dog", "zebra", "the")


def test_the_digest_is_of_words_and_order():
    digests = {WordList(words).digest for words in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", "c")]}
    assert len(digests) == 4
    assert WordList(("a", "b"), (1, 2)).digest == WordList(("a", "b")).digest


def fake_spacy(monkeypatch, parts):
    "A module with spaCy's two calls that we use: words get the parts of speech given, else X."

    def pipe(texts, batch_size):
        for text in texts:
            yield [SimpleNamespace(text=word, pos_=parts.get(word, "X")) for word in text.split()]

    def load(name, exclude):
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model {name!r}.")
        return SimpleNamespace(pipe=pipe)

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))


def test_parts_of_speech_choose_the_words(monkeypatch):
    fake_spacy(monkeypatch, {"Dog": "NOUN", "red": "ADJ", "up": "ADP", "3": "NOUN", "runs": "VERB"})
    texts = ["red Dog runs up", "3 red"]
    assert list(tagged_words(texts)) == ["red", "dog", "runs", "red"]
    words = corpus_words(texts, by="parts_of_speech", parts=("NOUN", "ADJ"))
    assert (words.words, words.counts) == (("red", "dog"), (2, 1))
    with pytest.raises(InputError, match="python -m spacy download de_core_news_sm"):
        list(tagged_words(texts, model="de_core_news_sm"))


def test_without_spacy_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)  # import fails
    with pytest.raises(InputError, match="pip install spacy && python -m spacy download en_core_web_sm"):
        corpus_words(CAPTIONS, by="parts_of_speech")
    assert corpus_words(CAPTIONS).words  # by frequency it is not needed


class Silent:
    "A tokenizer that splits every word into nothing."

    unk_token_id = None

    def __call__(self, words, add_special_tokens):
        return {"input_ids": [[] for _ in words]}


def test_words_that_cannot_be_encoded_are_named():
    tokenizer = tiny_joint_space(WordList(("dog", "wall"))).tokenizer
    words = WordList(("dog", "hund", "wall", "dog mauer"))
    assert unencodable(words, tokenizer) == ["hund", "dog mauer"]
    require_encodable(words.without(unencodable(words, tokenizer)), tokenizer)
    with pytest.raises(InputError, match="2 of 4 words .* such as .'hund'"):
        require_encodable(words, tokenizer)
    assert unencodable(words, Silent()) == list(words.words)


def test_templates_are_filled():
    assert in_template(["red dog"], "a photo of a {}.") == ["a photo of a red dog."]
    assert in_template(["{}"], "{}!") == ["{}!"]


BAD = {
    "empty": lambda path: WordList(()),
    "stop words only": lambda path: corpus_words(["the of and"]),
    "no text": lambda path: corpus_words([]),
    "too rare": lambda path: corpus_words(CAPTIONS, least=9),
    "repeated": lambda path: WordList(("a", "a")),
    "empty word": lambda path: WordList(("a", "")),
    "spaces": lambda path: WordList((" a",)),
    "line break": lambda path: WordList(("a\nb",)),
    "a number": lambda path: WordList((3,)),
    "counts": lambda path: WordList(("a", "b"), (1,)),
    "all taken out": lambda path: WordList(("a",)).without(["a"]),
    "unknown way": lambda path: corpus_words(CAPTIONS, by="nouns"),
    "options of the other way": lambda path: corpus_words(CAPTIONS, parts=("NOUN",)),
    "least 0": lambda path: corpus_words(CAPTIONS, least=0),
    "most 0": lambda path: corpus_words(CAPTIONS, most=0),
    "bytes": lambda path: corpus_words([b"a dog"]),
    "missing folder": lambda path: corpus_words(path / "nowhere"),
    "missing file": lambda path: word_file(path / "nowhere.txt"),
    "a folder": lambda path: word_file(path),
    "Latin-1": lambda path: word_file(path / "latin1.txt"),
    "blank file": lambda path: word_file(path / "blank.txt"),
    "odd count": lambda path: word_file(path / "count.txt"),
    "no braces": lambda path: in_template(["a"], "a photo"),
    "two words": lambda path: in_template(["a"], "{} and {}"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "count.txt").write_text("dog\tmany\n", encoding="utf-8")
    with pytest.raises(InputError):
        BAD[case](tmp_path)
