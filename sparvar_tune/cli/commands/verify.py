"""The command `verify`: a profile measured again on this machine; what fails runs dense here from then on."""

from __future__ import annotations

from sparvar_tune.cli.console import note, require_here, say, status
from sparvar_tune.cli.exit_codes import ExitCode
from sparvar_tune.cli.json_answer import Asked, print_answer
from sparvar_tune.cli.options import VerifyOptions
from sparvar_tune.profile import store
from sparvar_tune.ways import verify


def run(options: VerifyOptions) -> ExitCode:
    subject = options.subject
    subject.require_row()
    reason = subject.why_not_images()
    if reason:
        raise ValueError(reason)
    require_here("verify", subject)
    tuned = subject.load(options.profile)
    if tuned.profile is None:
        raise ValueError(f"nothing to verify: {'; '.join(tuned.reasons)}")
    images = store.images_of(tuned.profile.workload, subject.model)
    if options.profile is None and images != subject.images:
        raise ValueError(f"verify: no profile for {subject.images} images at once; tune for that, or give --images {images}")
    speak = note if options.json else say
    found = verify.verify(
        tuned, subject.open and (lambda: subject.adapter), options.pairs, options.budget_s, options.write, speak, status
    )
    code = ExitCode.DONE if found.good else ExitCode.FAILED
    if options.json:
        print_answer("verify", code, Asked.of(subject), {"profile": str(tuned.path)}, found)
    return code
