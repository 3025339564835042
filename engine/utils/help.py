"""How --help shows a setting."""

from __future__ import annotations

from argparse import Action

from jsonargparse import DefaultHelpFormatter


class SettingsHelp(DefaultHelpFormatter):
    """Shows no empty default."""

    def _expand_help(self, action: Action) -> str:
        return str(super()._expand_help(action)).replace(", default: )", ", no default)")
