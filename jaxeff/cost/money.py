"""What it costs: machine hours and electricity, at prices the caller states.

No price stands in this module: prices change by the month and the contract, and a
figure without its price cannot be compared.
"""


def _price(usd: float | int, per: str) -> float:
    if not usd >= 0:
        raise ValueError(f"a price is >= 0, got {usd} USD per {per}. 0 is free.")
    return float(usd)


def run_usd(
    seconds: float | int, *, usd_per_hour: float | int, devices: int = 1
) -> float:
    """Price of a run on rented machines.

    Args:
        seconds: of the run.
        usd_per_hour: for one device (or machine).
        devices: how many were rented.
    """
    return seconds / 3600 * devices * _price(usd_per_hour, "hour")


def electricity_usd(
    joules: float | int, *, usd_per_kwh: float | int, pue: float | int = 1.0
) -> float:
    """Price of the electricity of a run on one's own machines.

    Args:
        joules: at the machine.
        usd_per_kwh: price of electricity.
        pue: what the building draws per watt of the machines, >= 1.
    """
    if pue < 1:
        raise ValueError(
            f"pue is the whole building's power over the machines', so >= 1; got {pue}."
        )
    return joules / 3.6e6 * pue * _price(usd_per_kwh, "kWh")


def usd_per_million(
    latency_seconds: float | int, batch: int, *, usd_per_hour: float | int
) -> float:
    """Price of a million predictions on a machine that does nothing else.

    Args:
        latency_seconds: of one call.
        batch: predictions per call.
        usd_per_hour: for the machine.
    """
    if batch < 1:
        raise ValueError(f"batch must be >= 1 prediction per call, got {batch}.")
    return run_usd(1e6 * latency_seconds / batch, usd_per_hour=usd_per_hour)
