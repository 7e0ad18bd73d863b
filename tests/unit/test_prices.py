"""What a job costs: exact to a thousandth of a credit, and the same whenever it is worked out again."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img.money.prices import PriceTable, Receipt, from_credits, in_credits
from img2img.params import FITS, MAX_SEED, OUTPUT_FORMATS, SCHEDULERS, SIZES, Img2ImgParams

bases = st.integers(1, 999_999_999)
tables = st.builds(PriceTable, bases, st.dictionaries(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1), bases))
dimensions = st.sampled_from(SIZES)
paid_for = {
    "samples": st.integers(1, 4),
    "num_inference_steps": st.integers(20, 100),
    "img_width": dimensions,
    "img_height": dimensions,
}
free = {
    "prompt": st.text(max_size=20),
    "negative_prompt": st.text(max_size=20),
    "scheduler": st.sampled_from(SCHEDULERS),
    "guidance_scale": st.floats(0.1, 25),
    "strength": st.floats(0.1, 1),
    "seed": st.integers(-1, MAX_SEED),
    "fit": st.sampled_from(FITS),
    "output_format": st.sampled_from((None, *OUTPUT_FORMATS)),
}
jobs = st.builds(Img2ImgParams, **(free | paid_for))


def params(**others: Any) -> Img2ImgParams:
    return Img2ImgParams(prompt="a castle", **others)


# Amounts


@pytest.mark.parametrize(
    ("thousandths", "shown"),
    [
        (0, "0"),
        (1, "0.001"),
        (10, "0.01"),
        (500, "0.5"),
        (1000, "1"),
        (1500, "1.5"),
        (10_000, "10"),
        (100_000, "100"),
        (1_000_000_001, "1000000.001"),
        (-1, "-0.001"),
        (-2500, "-2.5"),
    ],
)
def test_an_amount_is_shown_in_credits(thousandths, shown):
    assert in_credits(thousandths) == shown
    assert from_credits(shown) == thousandths


@given(st.integers(-(10**15) + 1, 10**15 - 1))
def test_an_amount_is_read_as_it_is_shown(thousandths):
    assert from_credits(in_credits(thousandths)) == thousandths


@pytest.mark.parametrize(
    ("text", "thousandths"), [("+3", 3000), ("007", 7000), ("2.50", 2500), ("0.000", 0), ("-0", 0), ("1.05", 1050)]
)
def test_other_ways_to_write_an_amount(text, thousandths):
    assert from_credits(text) == thousandths


@pytest.mark.parametrize(
    "text",
    [
        *("", " 1", "1 ", "1\n", ".5", "1.", "1.2345", "1,5", "1e3", "--1", "+-1"),
        *("nan", "inf", "0x10", "1_000", "٣", "²", "9999999999999"),
    ],
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="a number of credits with at most three decimals"):
        from_credits(text)


@given(st.text(max_size=12))
def test_no_text_is_read_as_another_number_than_it_spells(text):
    try:
        amount = from_credits(text)
    except ValueError:
        return
    assert Fraction(amount, 1000) == Fraction(text)


# The table


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("1000", PriceTable(1000)),
        ("1", PriceTable(1)),
        ("999999999", PriceTable(999_999_999)),
        ("1000,sagemaker=600", PriceTable(1000, {"sagemaker": 600})),
        ("1000,sagemaker=600,segmind=900", PriceTable(1000, {"segmind": 900, "sagemaker": 600})),
    ],
)
def test_a_price_table_is_read(text, table):
    assert PriceTable.parse(text) == table


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-5", "+5", "1.5", "1e3", "٣", " 1000", "1000\n", "1000,", "1000000000"),
        *(",sagemaker=6", "sagemaker=600", "1000,sagemaker", "1000,sagemaker=", "1000,sagemaker=0"),
        *("1000,=600", "1000, sagemaker=600", "1000;sagemaker=600", "1000,Sage=6"),
    ],
)
def test_what_is_no_price_table_is_refused(text):
    with pytest.raises(ValueError, match="must read like 1000 or 1000,sagemaker=600"):
        PriceTable.parse(text)


@given(tables)
def test_a_table_can_be_read_from_its_version(table):
    _, _, text = table.version.partition(":")
    assert PriceTable.parse(text) == table


@given(tables, tables)
def test_versions_differ_exactly_where_tables_do(one, other):
    assert (one.version == other.version) == (one == other)


def test_a_version_does_not_depend_on_the_order_of_backends():
    tables = [PriceTable.parse(text) for text in ("1000,a=1,b=2", "1000,b=2,a=1")]
    assert len({table.version for table in tables}) == 1


# Quotes


@pytest.mark.parametrize(
    ("asked", "price"),
    [
        ({}, 1000),
        ({"samples": 4}, 4000),
        ({"num_inference_steps": 100}, 5000),
        ({"num_inference_steps": 33}, 1650),
        ({"img_width": 768}, 1500),
        ({"img_height": 768}, 1500),
        ({"img_width": 768, "img_height": 768}, 2250),
        ({"samples": 2, "num_inference_steps": 40, "img_width": 768}, 6000),
        ({"samples": 4, "num_inference_steps": 100, "img_width": 768, "img_height": 768}, 45_000),
        # 2362.5 for one sample: rounded up before it is multiplied.
        ({"num_inference_steps": 21, "img_width": 768, "img_height": 768}, 2363),
        ({"samples": 3, "num_inference_steps": 21, "img_width": 768, "img_height": 768}, 7089),
    ],
)
def test_a_quote(asked, price):
    quoted = PriceTable(1000).quote(params(**asked), "segmind")
    assert quoted == Receipt(reserved=price, charged=0, released=0, price_version=PriceTable(1000).version)


@given(tables, jobs, st.data())
def test_a_quote_is_the_formula_rounded_up_for_each_sample(table, job, data):
    backend = data.draw(st.sampled_from(["segmind", *table.of_backend]))
    base = table.of_backend.get(backend, table.base)
    pixels = job.img_width * job.img_height
    one = base * Fraction(job.num_inference_steps, 20) * Fraction(pixels, 512 * 512)
    assert table.quote(job, backend).reserved == job.samples * math.ceil(one)


def test_a_backend_may_have_a_base_of_its_own():
    table = PriceTable.parse("1000,sagemaker=600")
    assert table.quote(params(), "sagemaker").reserved == 600
    assert table.quote(params(), "segmind").reserved == 1000


@given(tables, jobs, st.fixed_dictionaries(free))
def test_only_samples_steps_and_pixels_cost_anything(table, job, others):
    assert table.quote(replace(job, **others), "segmind") == table.quote(job, "segmind")


@given(tables, jobs, st.fixed_dictionaries(paid_for))
def test_more_is_never_cheaper(table, job, others):
    more = replace(job, **{name: max(value, getattr(job, name)) for name, value in others.items()})
    assert table.quote(more, "segmind").reserved >= table.quote(job, "segmind").reserved > 0


@given(tables, jobs)
def test_samples_add_up(table, job):
    one = table.quote(replace(job, samples=1), "segmind").reserved
    assert table.quote(job, "segmind").reserved == job.samples * one


# Receipts


@given(tables, jobs, st.data())
def test_a_receipt_is_settled_to_the_last_thousandth(table, job, data):
    quoted = table.quote(job, "segmind")
    delivered = data.draw(st.integers(0, job.samples))
    settled = quoted.settled(samples=job.samples, delivered=delivered)
    assert settled.charged == table.quote(replace(job, samples=1), "segmind").reserved * delivered
    assert settled.charged + settled.released == settled.reserved == quoted.reserved
    assert settled.price_version == quoted.price_version
