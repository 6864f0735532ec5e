"""A problem file for a checkpoint of other people's making, as far as the checkpoint shows what must be in it."""

from sharpscope.scaffold.command import command, command_without_file
from sharpscope.scaffold.seen import Seen, look
from sharpscope.scaffold.text import open_lines, problem_text

__all__ = ["Seen", "command", "command_without_file", "look", "open_lines", "problem_text"]
