"""A changed config.json is read as by transformers, or refused, or warned about."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize(
    ("kind", "share"),
    [("deleted", 1), ("unknown", 1), ("contradicted", 0.2), ("changed", 0.05), ("types", 0.05)],
)
def test_no_change_affects_transformers_only(kind, share):
    """For every architecture, in both forms of config.json."""
    pytest.importorskip("torch")
    import config_changes

    judged = list(config_changes.judge_architectures([kind], seed=7, share=share))
    assert [row for row in judged if row[2] in ("QUIET", "CRASH")] == []
    assert {"same", "refused"} <= {verdict for _, _, verdict, _ in judged}
