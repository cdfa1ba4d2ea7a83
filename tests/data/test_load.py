import pytest

from jaxeff.data import digits, load


def test_a_name_loads_what_its_function_gives():
    by_name, (direct, _) = load("digits", mean=(0.1,))[0], digits(mean=(0.1,))
    assert by_name.images.tobytes() == direct.images.tobytes()


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="digits, fashion_mnist, cifar10"):
        load("mnist")


def test_a_data_set_of_files_needs_their_folder():
    with pytest.raises(ValueError, match="cifar10 is not part of the package"):
        load("cifar10")
