"""Write the card of a converted model."""

from splitquant_mlx.progress import Silent
from splitquant_mlx.publish.card import make_card
from splitquant_mlx.publish.files import check_converted
from splitquant_mlx.publish.measurements import find_measurements


def card(path, repo="user/name", results=(), **options):
    """Return the text of the card that an upload to `repo` would carry."""
    converted = check_converted(path)
    return make_card(converted, repo, find_measurements(converted, results, Silent()), **options)
