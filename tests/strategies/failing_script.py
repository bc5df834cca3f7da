"""A user's script of two stages, one of which fails: `python failing_script.py RANK ACTION WHERE`."""

import sys

from strategies.failing_fits import ACTIONS, Faulty, faulty, staged, trainer_of

from fits import BOUNDARIES, loader  # isort: skip


class FailsEarly(Faulty):
    """Fails before the processes know each other."""

    def configure_callbacks(self):
        self.at("configure_callbacks")
        return []


def main(rank, action, where):
    trainer = trainer_of(staged(boundaries=BOUNDARIES[:1]), stages=2)
    trainer.fit(faulty(ACTIONS[action], int(rank), where, FailsEarly), loader(), loader(16))


if __name__ == "__main__":
    main(*sys.argv[1:])
