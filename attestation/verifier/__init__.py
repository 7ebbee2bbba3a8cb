"""Evidence, endorsements and reference values in, appraisal out: no network, no clock, no file."""

from attestation.verifier.appraisal import Appraisal as Appraisal
from attestation.verifier.check import Expected as Expected
from attestation.verifier.profile import BROKER as BROKER
from attestation.verifier.profile import SHOW as SHOW
from attestation.verifier.profile import Profile as Profile
from attestation.verifier.profile import load_profile as load_profile
from attestation.verifier.profile import with_virtual_roots as with_virtual_roots
from attestation.verifier.snp import verify_hcl as verify_hcl
from attestation.verifier.snp import verify_snp as verify_snp
