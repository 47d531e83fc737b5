"""Golden tables: answers that once went wrong somewhere, and what each rule makes of them. The source of a
rule is in its docstring; a dot is an answer that it leaves unparsed."""

import pytest

from aligned_mllm.evals import answer_rules, text_rules
from aligned_mllm.evals.answer_rules import clear_yes_no, letter_rule, pope_yes_no, yes_no_rule
from aligned_mllm.evals.benchmark import BenchmarkQuestion, benchmark_named
from aligned_mllm.evals.task import is_right

YES_NO = {  # clear (ours), pope, viral, mme, whole (lmms-eval)
    "yes": "yes yes yes yes yes",
    "Yes": "yes yes yes yes yes",
    "Yes.": "yes yes yes yes .",  # lmms-eval compares the whole answer
    "No, there is no dog.": "no no no no .",
    "NO": "no yes no no no",  # POPE knows No, no and not
    "NO.": "no yes no no .",
    "no": "no no no no no",
    "": ". yes . . .",  # POPE: everything else is yes
    " ": ". yes . . .",
    "There is no dog.": ". no no . .",
    "There is not.": ". no no . .",
    "yes yes no": ". no yes yes .",
    "yes or no": ". no yes yes .",
    "Yes, it is not red.": "yes no yes yes .",  # POPE finds the not
    "Yes. There is no cat.": "yes yes yes yes .",  # POPE reads the first sentence
    "Nothing": ". yes no no .",  # parts of words
    "Not sure.": ". yes no no .",  # POPE: Not with a capital is not in its list
    "Incorrect": ". yes yes . .",  # VIRAL finds "correct" in it
    "right": ". yes yes . .",
    "Answer: no": "no no no . .",
    "The answer is\nYes": "yes yes yes . .",
    "no\nthere is none": "no yes no no .",  # POPE splits at spaces alone
    "Ｙｅｓ": "yes yes . . .",  # full-width letters
    "**No**": "no yes no no .",
    "“No”": "no yes no no .",
    "nope": ". yes no no .",
    "I cannot see a dog": ". yes no . .",  # "no" in "cannot"
    "¿Sí?": ". yes . . .",
}


@pytest.mark.parametrize("answer", YES_NO)
def test_yes_or_no(answer):
    names = ("clear_yes_no", "pope_yes_no", "viral_yes_no", "mme_yes_no", "whole_yes_no")
    found = [getattr(answer_rules, name)(answer) or "." for name in names]
    assert found == YES_NO[answer].split(), list(zip(names, found))


OPTIONS = ("a cat", "a dog", "a bird")
LETTERS = {  # clear (ours), cambrian, mmstar, first, scienceqa, mmmu, vlmeval, viral, viral_pair
    "B": "B B B B B B B B B",
    "b": "B B B b . . . B B",
    "(B)": "B B B ( . B B B B",
    "B.": "B B B B . B B B B",  # ScienceQA: "B. " with a text, or B alone
    "B)": "B B B B . . B B B",
    "B: a dog": "B B B B . . B A B",
    "B. a dog": "B B B B B . B A B",  # VIRAL finds the article first
    "B a dog": "B B B B . B B A B",
    "The answer is B": "B B B T . B B B B",  # LLaVA wants a character after the letter
    "The answer is B.": "B B B T B B B B B",
    "The answer is: B": "B : T T . B B B B",  # Cambrian splits at "answer is", MMStar at "the answer is "
    "Answer: (c)": "C C A A . . . C A",  # VIRAL for MMVP finds the a of "answer"
    "Option B": "B O B O . B B B B",
    "a chair": ". A A a . . . A A",  # the article
    "A chair.": ". A A A . A A A A",
    "a dog": "B A A a . . B A A",
    "A DOG": "B A A A . A A A A",
    "It is a dog.": "B I I I . . B A A",
    "I see a cat": ". I I I . . A A A",
    "left and right": ". L L l . . . . A",
    "A or B": ". A A A . B . A .",  # MMMU takes the last
    "A, B": ". A A A . B . A .",
    "B and C": ". B B B . C . B B",
    "": ". . . . . . . . .",
    "Ｂ": "B Ｂ Ｂ Ｂ . . . . .",
    "（Ｂ）": "B （ （ （ . . . . .",
    "B\nIt is a dog.": "B B B B . . B A B",
    "\n\nB": "B B B B . . B B B",
    "D": ". D D D D . . D .",  # there are three options
    "Both of them.": ". B B B . . . . B",  # VIRAL for MMVP: a b in the first sentence, and no a
    "B, because a dog": "B B B B . . B A B",
    "(A) and (B)": ". A A ( . B . A A",
    "I.": ". I I I . . . . .",
}


@pytest.mark.parametrize("answer", LETTERS)
def test_a_letter(answer):
    names = (
        "clear",
        "cambrian",
        "mmstar",
        "first_character",
        "scienceqa",
        "mmmu",
        "vlmeval",
        "viral",
        "viral_pair",
    )
    parsers = [getattr(answer_rules, name if "_char" in name else f"{name}_letter") for name in names]
    found = [parser(answer, OPTIONS) or "." for parser in parsers]
    assert found == LETTERS[answer].split(), list(zip(names, found))


def question(*answers: str, **more) -> BenchmarkQuestion:
    return BenchmarkQuestion("1", (), "", answers, **more)


def test_of_more_than_five_words_mmmu_reads_the_text_of_an_option():
    assert answer_rules.mmmu_letter("I think that it is a dog", OPTIONS) == "B"
    assert answer_rules.mmmu_letter("Not a cat but, as I think, a dog", OPTIONS) == "B"  # the last
    assert answer_rules.mmmu_letter("I think that it is a fox", OPTIONS) is None  # MMMU guesses at random


@pytest.mark.parametrize(
    "answer, cambrian, viral",
    [
        ("a dog", "B", "A"),
        ("a dog.", "B", "A"),
        ("B:", "B", "B"),
        ("the dog", "THE DOG", None),
        ("", None, None),
    ],
)
def test_a_letter_of_a_pair(answer, cambrian, viral):
    assert answer_rules.cambrian_pair_letter(answer, OPTIONS[:2]) == cambrian
    assert answer_rules.viral_pair_letter(answer, OPTIONS[:2]) == viral


def test_the_strict_rule_reads_what_whole_comparison_misses():
    rule = yes_no_rule(clear_yes_no)
    assert not is_right("Yes, there is a dog.", "yes") and rule(question("yes"), "Yes, there is a dog.") == 1
    assert is_right(" YES. ", "yes") and rule(question("Yes"), " YES. ") == 1
    assert rule(question("yes"), "") is None and yes_no_rule(pope_yes_no)(question("yes"), "") == 1


def test_an_unparsed_letter_is_missing_or_wrong_as_the_rule_wants():
    official, strict = (letter_rule(answer_rules.mmstar_letter, unparsed) for unparsed in (0.0, None))
    assert (
        official(question("B", options=OPTIONS), "") == 0
        and strict(question("B", options=OPTIONS), "") is None
    )


TEN = ("2",) * 8 + ("two dogs", "two")
VQA = {  # answers of people, answer: VQA's own script, TextVQA and LLaVA
    (("yes",) * 10, "yes"): (1, 1),
    (("yes",) * 10, "Yes"): (0, 1),  # no normal form where all agree
    (("yes",) * 10, "yes."): (0, 1),
    (("yes",) * 9 + ("no",), "Yes."): (1, 1),
    (("yes",) * 3 + ("no",) * 7, "yes"): (0.9, 0.9),
    (("yes",) * 2 + ("no",) * 8, "yes"): (0.6, 0.6),
    (("yes",) + ("no",) * 9, "yes"): (0.3, 0.3),
    (TEN, "Two"): (1, 1),
    (TEN, "Two dogs"): (0.3, 0.3),
    (TEN, ""): (0, 0),
    (("dont know",) * 5 + ("don't know",) * 5, "don't know"): (1, 1),
    (("the dog",) * 5 + ("dog",) * 5, "A dog."): (1, 1),
    (("dog's",) * 5 + ("dogs",) * 5, "dog 's"): (0, 1),  # TextVQA parts 's
    (("1,000",) * 5 + ("1000",) * 5, "1,000"): (1, 1),
    (("red, white",) * 5 + ("red white",) * 5, "red,white"): (1, 0),  # a space, or nothing
    (("10.5",) * 5 + ("10",) * 5, "10.5"): (1, 1),
}


@pytest.mark.parametrize("people, answer", VQA)
def test_vqa_accuracy(people, answer):
    found = text_rules.vqa_rule(question(*people), answer), text_rules.evalai_rule(question(*people), answer)
    assert found == pytest.approx(VQA[people, answer])


TEXTS = {  # published, answer: exact (GQA), same_text (LLaVA), first_word (Cambrian), strict (ours)
    ("red", "red"): (1, 1, 1, 1),
    ("red", "Red."): (0, 1, 1, 1),
    ("red", " red "): (0, 1, 1, 1),
    ("red", "red\n"): (0, 1, 1, 1),
    ("red", "ＲＥＤ"): (0, 0, 0, 1),
    ("red", "The answer is red."): (0, 0, 1, 0),
    ("red", "The answer is: red"): (0, 0, 0, 0),  # Cambrian finds the colon
    ("red", "red car"): (0, 0, 1, 0),
    ("red", "not red"): (0, 0, 0, 0),
    ("red", ""): (0, 0, 0, None),
    ("café", "cafe\u0301"): (0, 0, 0, 1),  # two ways to write é
}


@pytest.mark.parametrize("published, answer", TEXTS)
def test_the_same_text(published, answer):
    names = ("exact_rule", "same_text_rule", "first_word_rule", "strict_text_rule")
    found = tuple(getattr(text_rules, name)(question(published), answer) for name in names)
    assert found == TEXTS[published, answer]


PLACES = {  # answer to "on" of left, right, on, under: AdaptVis, VIRAL, ours
    "On": (1, 1, 1),
    "It is on the table.": (1, 1, 1),
    "in front": (0, 1, None),  # "on" is part of "front"; AdaptVis excludes it
    "wonder": (1, 1, None),
    "": (0, 1, None),  # nothing is part of "on"
    "o": (0, 1, None),
    "left and right": (0, 0, None),
    "On the left": (1, 1, None),
    "Under": (0, 0, 0),
    "ｏｎ": (0, 0, 1),
}


@pytest.mark.parametrize("answer", PLACES)
def test_one_word_of_place(answer):
    asked = question("On", choices=("left", "right", "on", "under"))
    rules = (text_rules.adaptvis_rule, text_rules.viral_place_rule, text_rules.one_choice_rule)
    assert tuple(rule(asked, answer) for rule in rules) == PLACES[answer]


NUMBERS = {  # published, answer: official, ours
    ("42", "42"): (1, 1),
    ("42", "44.09"): (1, 1),  # 5 %
    ("42", "44.2"): (0, 0),
    ("42", "39.91"): (1, 1),
    ("42", "42."): (1, 1),
    ("42", "42%"): (0, 1),  # 0.42
    ("42%", "42"): (0, 1),
    ("0.42", "42%"): (1, 0),
    ("42", "$42"): (0, 1),
    ("1,200", "1200"): (0, 1),
    ("1,200", "1,200"): (1, 1),
    ("0", "0.0"): (0, 1),
    ("0", "0"): (1, 1),
    ("-5", "-5.2"): (1, 1),
    ("Yes", "yes"): (1, 1),
    ("Yes", "Yes."): (0, 1),
    ("42", ""): (0, None),
    ("2019", "2100"): (1, 1),  # years are numbers too: 81 years are 4 %
}


@pytest.mark.parametrize("published, answer", NUMBERS)
def test_relaxed_numbers(published, answer):
    found = [
        rule(question(published), answer)
        for rule in (text_rules.relaxed_rule, text_rules.strict_relaxed_rule)
    ]
    assert tuple(found) == NUMBERS[published, answer]


def test_text_that_is_contained():
    rule, formula = text_rules.ocrbench_rule, {"dataset": "HME100k"}
    assert rule(question("STOP", "HALT"), "it says\nstop") == 1 and rule(question("STOP"), "nonstop") == 1
    assert rule(question("A B"), "AB") == 0 and rule(question("A B", details=formula), "$AB$") == 1
    assert rule(question("A", details=formula), "a") == 0 and rule(question("A"), "") == 0


@pytest.mark.parametrize(
    "name", ["pope", "mmstar", "cvbench", "mmbench", "seed", "vstar", "mmmu", "scienceqa"]
)
def test_under_every_rule_the_plain_answer_is_right(name):
    options = () if name == "pope" else OPTIONS
    right, wrong = ("yes", "no") if name == "pope" else ("B", "C")
    for rule in benchmark_named(name).rules.values():
        asked = question(right, options=options)
        assert rule(asked, right) == 1 and rule(asked, wrong) == 0
