import dataclasses

from vlmtune.config.flag_table import ALIASES, GROUPS, flags
from vlmtune.config.limits import LIMITS, UNSUPPORTED
from vlmtune.config.parse import PRESET
from vlmtune.config.settings import Settings


def test_tables_name_real_options_and_names_are_unique() -> None:
    names = list(flags())
    assert len(names) == sum(len(dataclasses.fields(group)) for group in GROUPS.values())
    assert {name for name, flag in flags().items() if not flag.in_settings} == set(UNSUPPORTED)
    assert set(UNSUPPORTED) | set(LIMITS) | set(ALIASES.values()) | set(PRESET) <= set(names)
    assert not set(ALIASES) & set(names)


def test_every_default_is_accepted_as_a_value() -> None:
    plain = Settings.from_flags({})
    assert plain.replace(**{name: plain.value(name) for name in flags()}) == plain
    assert plain.to_flags() == {}
