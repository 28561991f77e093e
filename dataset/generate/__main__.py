"""The command: python -m dataset.generate {questions,exemplars,rephrase} …; docs/generate.md
explains it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter

from dataset.conversation.exemplars import ExemplarLibrary
from dataset.files.errors import DataError
from dataset.files.text import read_json
from dataset.generate import exemplars, questions, rephrase
from dataset.generate.client import Abort, Stopped
from dataset.generate.estimate import estimate_table
from dataset.generate.flags import build_parser, read_source
from dataset.generate.scenes import read_scenes
from dataset.generate.session import Session
from dataset.generate.work import write_json


def run_questions(args: Namespace, session: Session) -> int:
    options = questions.QuestionOptions(
        args.objects,
        args.least_share,
        args.most_share,
        args.rounds,
        not args.allow_names,
        args.most_repeats,
    )
    if args.validation + args.test > 1:
        raise ValueError(
            f"--validation {args.validation} and --test {args.test} are more than all images"
        )
    scenes = [
        scene for values in args.source for scene in read_scenes(read_source(values), args.seed)
    ]
    twice = [name for name, count in Counter(scene.name for scene in scenes).items() if count > 1]
    if twice:
        raise DataError(
            f"two sources hold an image {twice[0]}; LLM-Seg40K tells images by their names, so"
            " rename one"
        )
    captioner, chat = session.captioner(), session.chat()
    outcome = session.run(
        scenes, lambda scene: questions.ask_about(scene, captioner, chat, args.image_side, options)
    )
    if args.dry_run:
        return 0
    asked = questions.without_repeats([one for one in outcome.results if one], options.most_repeats)
    counts = questions.write_splits(asked, args.out, args.validation, args.test)
    summary = (
        f"{sum(counts.values())} questions about {sum(bool(one.pairs) for one in asked)} of"
        f" {len(scenes)} images"
    )
    return session.finish(
        outcome, [reason for one in asked for reason in one.refused], summary, {"questions": counts}
    )


def run_exemplars(args: Namespace, session: Session) -> int:
    ExemplarLibrary(args.library)
    library = read_json(args.library)
    domains = (
        args.domains.split(",") if args.domains else [entry.get("domain") for entry in library]
    )
    domains = list(dict.fromkeys(domain.strip() for domain in domains if domain))
    if not all(domains) or not domains:
        raise ValueError("--domains holds an empty name; write them as kitchen,tools")
    chat = session.chat()
    outcome = session.run(
        domains, lambda domain: exemplars.grow(domain, library, args.per_domain, chat, args.rounds)
    )
    if args.dry_run:
        return 0
    whole, refused = exemplars.merge(library, outcome.results)
    write_json(args.out, whole)
    ExemplarLibrary(args.out)  # what is written can be read
    return session.finish(
        outcome,
        refused,
        f"{len(whole)} pairs, {len(whole) - len(library)} of them new",
        {"pairs": len(whole)},
    )


def run_rephrase(args: Namespace, session: Session) -> int:
    if args.out.resolve() == args.data.resolve():
        raise ValueError(
            "--out is --data; the wordings go to another folder, such as"
            " reason_seg/ReasonSeg-rephrased/train"
        )
    found = rephrase.read_queries(args.data)
    chat = session.chat()
    outcome = session.run(
        found, lambda pair: rephrase.reword(pair[0].name, pair[1], args.wordings, chat, args.rounds)
    )
    if args.dry_run:
        return 0
    count = rephrase.write_split(args.data, found, outcome.results, args.out)
    refused = [reason for talk in outcome.results if talk for reason in talk.refused]
    return session.finish(
        outcome, refused, f"{count} new wordings of {len(found)} queries", {"wordings": count}
    )


COMMANDS = {"questions": run_questions, "exemplars": run_exemplars, "rephrase": run_rephrase}


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done; 1 something got no answer, and the same command goes on; 2 a wrong flag or
    file; 130 interrupted."""
    session = None
    try:
        args = build_parser().parse_args(argv)
        session = Session(args)
        code = COMMANDS[args.command](args, session)
        if args.dry_run:
            print(estimate_table(session.counts, session.prices))
        return code
    # a file that is not there, a folder that cannot be written, a full disk
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Abort, Stopped) as error:
        print(
            f"error: {error}; answers so far are kept, and the same command goes on",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted; answers so far are kept, and the same command goes on", file=sys.stderr)
        return 130
    finally:
        if session is not None:
            session.close()


if __name__ == "__main__":
    sys.exit(main())
