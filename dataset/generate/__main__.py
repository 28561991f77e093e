"""The command: python -m dataset.generate {questions,exemplars,rephrase} …; docs/generate.md
explains it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from dataclasses import fields

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

from cores.dataset.conversation.exemplars import ExemplarLibrary
from cores.dataset.files.errors import DataError
from cores.dataset.files.text import read_json
from cores.dataset.generate import exemplars, questions, rephrase
from cores.dataset.generate.client import Abort, Stopped
from cores.dataset.generate.estimate import estimate_table
from cores.dataset.generate.flags import build_parser, read_source
from cores.dataset.generate.run import GenerationRun, write_json
from cores.dataset.generate.scenes import read_photographs


def run_questions(args: Namespace, run: GenerationRun) -> int:
    names = [field.name for field in fields(questions.QuestionOptions)]
    options = questions.QuestionOptions(**{name: getattr(args, name) for name in names})
    if args.validation + args.test > 1:
        raise ValueError(
            f"--validation {args.validation} and --test {args.test} are more than all images"
        )
    sources = [read_source(values) for values in args.source]
    photographs = [one for source in sources for one in read_photographs(source, args.seed)]
    counts = Counter(photograph.name for photograph in photographs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(
            f"two sources hold an image {twice[0]}; LLM-Seg40K tells images by their names, so"
            " rename one"
        )
    captioner, chat = run.captioner(), run.chat()
    outcome = run.do_all(
        photographs,
        lambda one: questions.ask_about(one, captioner, chat, args.image_side, options),
    )
    if args.dry_run:
        return 0
    asked = questions.without_repeats([one for one in outcome.results if one], options.most_repeats)
    written = questions.write_splits(asked, args.out, args.validation, args.test)
    summary = (
        f"{sum(written.values())} questions about {sum(bool(one.pairs) for one in asked)} of"
        f" {len(photographs)} images"
    )
    refused = [reason for one in asked for reason in one.refused]
    return run.finish(outcome, refused, summary, {"questions": written})


def run_exemplars(args: Namespace, run: GenerationRun) -> int:
    ExemplarLibrary(args.library)  # checks it
    library = read_json(args.library)
    domains = [entry.get("domain") for entry in library]
    if args.domains:
        domains = args.domains.split(",")
    domains = list(dict.fromkeys(domain.strip() for domain in domains if domain))
    if not all(domains) or not domains:
        raise ValueError("--domains holds an empty name; write them as kitchen,tools")
    chat = run.chat()
    outcome = run.do_all(
        domains, lambda domain: exemplars.grow(domain, library, args.per_domain, chat, args.rounds)
    )
    if args.dry_run:
        return 0
    whole, refused = exemplars.merge(library, outcome.results)
    write_json(args.out, whole)
    ExemplarLibrary(args.out)  # what is written can be read
    summary = f"{len(whole)} pairs, {len(whole) - len(library)} of them new"
    return run.finish(outcome, refused, summary, {"pairs": len(whole)})


def run_rephrase(args: Namespace, run: GenerationRun) -> int:
    if args.out.resolve() == args.data.resolve():
        raise ValueError(
            "--out is --data; the wordings go to another folder, such as"
            " reason_seg/ReasonSeg-rephrased/train"
        )
    found = rephrase.read_queries(args.data)
    chat = run.chat()
    outcome = run.do_all(
        found, lambda pair: rephrase.reword(pair[0].name, pair[1], args.wordings, chat, args.rounds)
    )
    if args.dry_run:
        return 0
    count = rephrase.write_split(args.data, found, outcome.results, args.out)
    refused = [reason for result in outcome.results if result for reason in result.refused]
    summary = f"{count} new wordings of {len(found)} queries"
    return run.finish(outcome, refused, summary, {"wordings": count})


KEPT = "answers so far are kept, and the same command goes on"
COMMANDS = {"questions": run_questions, "exemplars": run_exemplars, "rephrase": run_rephrase}


@command.entry(stopped=f"interrupted; {KEPT}")
def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done; 1 something got no answer, and the same command goes on; 2 a wrong flag or
    file; 130 interrupted."""
    run = None
    try:
        args = build_parser().parse_args(argv)
        run = GenerationRun(args)
        code = COMMANDS[args.command](args, run)
        if args.dry_run:
            print(estimate_table(run.estimates, run.prices))
        return code
    except (Abort, Stopped) as error:
        print(f"error: {command.one_line(error)}; {KEPT}", file=sys.stderr)
        return 1
    finally:
        if run is not None:
            run.close()


if __name__ == "__main__":
    sys.exit(main())
