"""A changed config.json is read as transformers reads it, or refused, or warned of."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    ("kind", "share"),
    [("deleted", 1), ("unknown", 1), ("contradicted", 0.2), ("changed", 0.05), ("types", 0.05)],
)
def test_no_change_is_followed_by_transformers_alone(kind, share):
    """Of every architecture, in both forms of a config.json."""
    pytest.importorskip("torch")
    import config_changes

    judged = list(config_changes.judge_architectures([kind], seed=7, share=share))
    assert [found for found in judged if found[2] in ("QUIET", "CRASH")] == []
    assert {"same", "refused"} <= {verdict for _, _, verdict, _ in judged}
