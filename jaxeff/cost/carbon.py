"""Grams of CO2 equivalent: kilowatt-hours, times the grid's intensity, times PUE.

Intensities are yearly means of where the power was generated; the hour of the day
can be half or double that. A small table stands here; `load_intensities` reads the
full one from a folder of CodeCarbon's files.

Source: Our World in Data / Ember (CC BY) for countries and Google's region table
for its cloud, both as collected by CodeCarbon (MIT); IEA for the world.
"""

import csv
import dataclasses
import difflib
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Intensity:
    """Carbon intensity of the electricity at a place."""

    place: str
    grams_per_kwh: float | int  # CO2 equivalent
    source: str
    year: int | None  # of the figure; None: the source does not say

    def __str__(self) -> str:
        year = f", {self.year}" if self.year else ""
        return f"{self.place}: {self.grams_per_kwh:g} gCO2e/kWh ({self.source}{year})"


_COUNTRY_SOURCE = "Our World in Data / Ember via CodeCarbon"
_GOOGLE_SOURCE = "Google Cloud region table via CodeCarbon"

# ISO code, name, gCO2e/kWh, year.
_COUNTRIES = (
    ("ARE", "United Arab Emirates", 561.135, 2022),
    ("ARG", "Argentina", 354.103, 2023),
    ("AUS", "Australia", 548.692, 2023),
    ("AUT", "Austria", 110.812, 2023),
    ("BEL", "Belgium", 138.107, 2023),
    ("BRA", "Brazil", 98.348, 2023),
    ("CAN", "Canada", 170.043, 2023),
    ("CHE", "Switzerland", 34.843, 2023),
    ("CHL", "Chile", 291.113, 2023),
    ("CHN", "China", 582.317, 2023),
    ("CZE", "Czechia", 449.724, 2023),
    ("DEU", "Germany", 380.95, 2023),
    ("DNK", "Denmark", 151.65, 2023),
    ("ESP", "Spain", 174.05, 2023),
    ("EST", "Estonia", 416.667, 2023),
    ("FIN", "Finland", 79.158, 2023),
    ("FRA", "France", 56.039, 2023),
    ("GBR", "United Kingdom", 237.589, 2023),
    ("GRC", "Greece", 336.574, 2023),
    ("HKG", "Hong Kong", 699.499, 2022),
    ("IDN", "Indonesia", 675.931, 2022),
    ("IND", "India", 713.441, 2023),
    ("IRL", "Ireland", 290.805, 2023),
    ("ISL", "Iceland", 27.68, 2022),
    ("ISR", "Israel", 582.927, 2022),
    ("ITA", "Italy", 330.718, 2023),
    ("JPN", "Japan", 485.392, 2023),
    ("KOR", "South Korea", 430.567, 2023),
    ("MEX", "Mexico", 507.245, 2023),
    ("NLD", "Netherlands", 267.622, 2023),
    ("NOR", "Norway", 30.08, 2023),
    ("NZL", "New Zealand", 112.758, 2023),
    ("POL", "Poland", 661.926, 2023),
    ("PRT", "Portugal", 165.553, 2023),
    ("SGP", "Singapore", 470.783, 2023),
    ("SWE", "Sweden", 40.695, 2023),
    ("TUR", "Turkey", 464.586, 2023),
    ("TWN", "Taiwan", 642.378, 2023),
    ("USA", "United States", 369.473, 2023),
    ("ZAF", "South Africa", 707.686, 2023),
)

_GOOGLE_REGIONS = (
    ("asia-east1", 451),
    ("asia-northeast1", 459),
    ("asia-south1", 648),
    ("asia-southeast1", 369),
    ("australia-southeast1", 501),
    ("europe-north1", 46),
    ("europe-west1", 122),
    ("europe-west2", 136),
    ("europe-west3", 345),
    ("europe-west4", 236),
    ("europe-west9", 34),
    ("southamerica-east1", 56),
    ("us-central1", 430),
    ("us-east1", 560),
    ("us-east4", 322),
    ("us-south1", 321),
    ("us-west1", 94),
    ("us-west2", 198),
)


def _table() -> dict[str, Intensity]:
    table = {"world": Intensity("world", 475.0, "IEA via CodeCarbon", 2018)}
    for code, name, grams, year in _COUNTRIES:
        table[code] = Intensity(name, grams, _COUNTRY_SOURCE, year)
    for region, grams in _GOOGLE_REGIONS:
        table[f"gcp/{region}"] = Intensity(
            f"gcp/{region}", float(grams), _GOOGLE_SOURCE, None
        )
    return table


INTENSITIES: Mapping[str, Intensity] = _table()


def intensity(place: str, table: Mapping[str, Intensity] = INTENSITIES) -> Intensity:
    """The carbon intensity of a country or cloud region.

    Args:
        place: an ISO-3 code (`FRA`), a country's name, a cloud region with its
            provider (`gcp/europe-west9`) or, where no two share it, without.
        table: the one embedded here, or one from `load_intensities`.

    Raises:
        ValueError: no such place, or several.
    """
    wanted = place.strip().lower()
    found = {k: v for k, v in table.items() if wanted in _aliases(k, v)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(
            f"{place!r} means {len(found)} places: {', '.join(found)}. Say which."
        )
    names = {alias: k for k, v in table.items() for alias in _aliases(k, v)}
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.7)
    listed = " or ".join(dict.fromkeys(names[n] for n in near))
    raise ValueError(
        f"no carbon intensity for {place!r} among {len(table)} places. "
        f"{f'Did you mean {listed}? ' if listed else ''}Give a country by its name or "
        "ISO code of three letters (France, FRA), a cloud region (gcp/europe-west9), "
        "or world."
    )


def _aliases(key: str, value: Intensity) -> set[str]:
    aliases = {key.lower(), value.place.lower()}
    if "/" in key:
        aliases.add(key.lower().split("/", 1)[1])
    return aliases


def grams_co2(
    joules: float | int, place: Intensity | str | float | int, *, pue: float | int = 1.0
) -> float:
    """Grams of CO2 equivalent.

    Args:
        joules: at the machine.
        place: an intensity, a place of the table, or grams per kWh.
        pue: power usage effectiveness, what the building draws per watt of the
            machines: 1 for the machine alone, about 1.1 in the largest data
            centres and 1.6 in the average one.
    """
    if pue < 1:
        raise ValueError(
            f"pue is the whole building's power over the machines', so >= 1; got {pue}."
        )
    if isinstance(place, str):
        place = intensity(place)
    grams = place.grams_per_kwh if isinstance(place, Intensity) else float(place)
    return joules / 3.6e6 * grams * pue


def load_intensities(folder: Path | str) -> dict[str, Intensity]:
    """The full tables from a folder of CodeCarbon's files.

    Args:
        folder: with `global_energy_mix.json.gz` (or `.json`), and perhaps
            `cloud_impact.csv`.

    Raises:
        ValueError: the folder lacks the first file, or a file is not readable.
    """
    folder = Path(folder)
    packed, plain = (folder / f"global_energy_mix.json{end}" for end in (".gz", ""))
    path = packed if packed.exists() else plain
    if not path.exists():
        raise ValueError(
            f"{folder} has no global_energy_mix.json.gz. Name a folder with "
            "CodeCarbon's tables, or use the embedded table."
        )
    try:
        raw = path.read_bytes()
        mix = json.loads(gzip.decompress(raw) if path == packed else raw)
        table = dict(_countries(mix))
        clouds = folder / "cloud_impact.csv"
        if clouds.exists():
            # The file begins with a byte-order mark.
            table |= _clouds(clouds.read_text(encoding="utf-8-sig").splitlines())
    except (
        OSError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"the tables in {folder} cannot be read ({error!r}). Fetch them again."
        ) from error
    return {"world": INTENSITIES["world"], **table}


def _countries(mix: Mapping[str, dict]) -> Iterable[tuple[str, Intensity]]:
    for code, entry in mix.items():
        grams = float(entry["carbon_intensity"])
        name, year = entry["country_name"], int(entry["year"])
        yield code, Intensity(name, grams, _COUNTRY_SOURCE, year)


def _clouds(lines: Iterable[str]) -> dict[str, Intensity]:
    table = {}
    for row in csv.DictReader(lines):
        key = f"{row['provider']}/{row['region']}"
        source = row["source"] or "source not given"
        table[key] = Intensity(key, float(row["impact"]), source, None)
    return table
