import csv
import gzip
import json

import pytest
from hypothesis import given, strategies as st

from jaxeff.cost import grams_co2, INTENSITIES, Intensity, intensity, load_intensities


@given(kwh=st.floats(0, 1e6), grams=st.floats(0, 1000), pue=st.floats(1, 2))
def test_grams_are_kwh_times_intensity_times_pue(kwh, grams, pue):
    place = Intensity("x", grams, "test", 2020)
    assert grams_co2(kwh * 3.6e6, place, pue=pue) == pytest.approx(kwh * grams * pue)
    assert grams_co2(kwh * 3.6e6, grams, pue=pue) == pytest.approx(kwh * grams * pue)


@pytest.mark.parametrize("place", ["FRA", "fra", "France", " france "])
def test_a_country_is_found_by_code_and_by_name(place):
    assert intensity(place).place == "France"
    assert intensity(place).grams_per_kwh == pytest.approx(56.039)
    assert intensity(place).year == 2023


def test_a_cloud_region_is_found_with_and_without_its_provider():
    assert intensity("gcp/us-west1") == intensity("us-west1")


def test_every_place_has_a_source_and_a_plausible_intensity():
    for place in INTENSITIES.values():
        assert 0 < place.grams_per_kwh < 1100
        assert place.source and place.source in str(place)


def test_an_unknown_place_lists_its_near_misses():
    with pytest.raises(ValueError, match="FRA"):
        intensity("Frankreich")
    with pytest.raises(ValueError, match="places. Give a country by its name or ISO"):
        intensity("Atlantis")
    with pytest.raises(ValueError, match="gcp/us-west1"):
        intensity("us-west-1")


def test_a_region_that_two_providers_share_must_be_said_in_full():
    both = {k: Intensity(k, 1.0, "test", None) for k in ("a/west", "b/west")}
    with pytest.raises(ValueError, match="a/west, b/west"):
        intensity("west", both)
    assert intensity("b/west", both).place == "b/west"


def test_a_pue_below_one_is_refused():
    with pytest.raises(ValueError, match=">= 1"):
        grams_co2(1.0, 100.0, pue=0.5)


def folder_of_tables(tmp_path, mix, clouds=None):
    path = tmp_path / "global_energy_mix.json.gz"
    path.write_bytes(gzip.compress(json.dumps(mix).encode()))
    if clouds is not None:
        with (tmp_path / "cloud_impact.csv").open("w", encoding="utf-8-sig") as f:
            writer = csv.DictWriter(f, ["provider", "region", "impact", "source"])
            writer.writeheader()
            writer.writerows(clouds)
    return tmp_path


def test_a_folder_of_tables_is_read_past_its_byte_order_mark(tmp_path):
    mix = {"ZZZ": {"carbon_intensity": 12.5, "country_name": "Nowhere", "year": 2001}}
    cloud = {"provider": "p", "region": "r", "impact": "7", "source": "s"}
    table = load_intensities(folder_of_tables(tmp_path, mix, [cloud]))
    assert intensity("nowhere", table).grams_per_kwh == 12.5
    assert intensity("p/r", table) == Intensity("p/r", 7.0, "s", None)
    assert "world" in table


def test_a_folder_without_tables_or_with_broken_ones_is_refused(tmp_path):
    with pytest.raises(ValueError, match="global_energy_mix"):
        load_intensities(tmp_path)
    (tmp_path / "global_energy_mix.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ValueError, match="cannot be read"):
        load_intensities(tmp_path)
    folder_of_tables(tmp_path, {"ZZZ": {"year": 2001}})
    with pytest.raises(ValueError, match="cannot be read"):
        load_intensities(tmp_path)


def test_the_embedded_table_is_a_part_of_the_full_one(data_dir):
    full = load_intensities(data_dir("carbon_tables"))
    assert len(full) == 1 + 213 + 40
    for key, place in INTENSITIES.items():
        assert full[key].grams_per_kwh == pytest.approx(place.grams_per_kwh), key
        assert full[key].year == place.year, key
