"""Checks of the guest policy (POLICY) and of the machine's settings (PLATFORM_INFO), bit by bit.

Bits: AMD publication 56860, tables "Guest policy structure" and "PLATFORM_INFO field".
"""

from __future__ import annotations

from attestation.evidence.report import Product
from attestation.verifier.check import NOT_JUDGED, Case, Claim, Verdict, bit_verdict, check

POLICY_BITS = {
    "smt": 16,
    "migrate-ma": 18,
    "debug": 19,
    "single-socket": 20,
    "cxl-allow": 21,
    "mem-aes-256-xts": 22,
    "rapl-dis": 23,
    "ciphertext-hiding-dram": 24,
    "page-swap-disable": 25,
}
_POLICY_ONE = 1 << 17
_POLICY_RESERVED = ~((1 << 26) - 1) & (1 << 64) - 1

PLATFORM_BITS = {
    "smt": 0,
    "tsme": 1,
    "ecc": 2,
    "rapl-dis": 3,
    "ciphertext-hiding-dram": 4,
    "alias-check": 5,
    "iommu-write-safe": 6,
    "tio": 7,
}
_PLATFORM_KNOWN = (1 << 8) - 1

# The first SEV firmware that reports ALIAS_CHECK_COMPLETE, by product; Turin's always has.
_ALIAS_CHECK_SINCE = {Product.MILAN: (1, 55, 22), Product.GENOA: (1, 55, 38), Product.TURIN: (0, 0, 0)}


@check(Claim.CONFIGURATION, "Y - - - - -")
def policy_reserved(case: Case) -> Verdict:
    """POLICY's bit 17 is one, its bits 63 to 26 zero.

    Attack: a permission of newer firmware that this verifier does not understand, granted by the host.
    """
    policy = case.report.policy
    if policy & _POLICY_ONE and not policy & _POLICY_RESERVED:
        return None
    return f"0x{policy:x}", "bit 17 set, bits 63 to 26 clear"


@check(Claim.CONFIGURATION, "o - - o - -")
def policy_abi(case: Case) -> Verdict:
    """The firmware ABI that POLICY demands (major.minor) is at least the profile's.

    Attack: a platform rolled back to firmware that ignores newer policy bits.
    """
    policy = case.report.policy
    found = (policy >> 8 & 0xFF, policy & 0xFF)
    lowest = case.profile.policy.minimum_abi
    if found >= tuple(int(part) for part in lowest.split(".")):
        return None
    return f"{found[0]}.{found[1]}", f"at least {lowest}"


def _policy(case: Case, name: str, wanted: str) -> Verdict:
    return bit_verdict(case.report.policy, POLICY_BITS[name], wanted)


@check(Claim.CONFIGURATION, "o - - o - Y")
def policy_smt(case: Case) -> Verdict:
    """POLICY's SMT (hyper-threads allowed) is as the profile has it.

    Attack: a sibling thread that watches the guest's (SQUIP, CVE-2021-46778; cross-thread predictions, CVE-2022-27672).
    """
    return _policy(case, "smt", case.profile.policy.smt)


@check(Claim.RUNTIME_OPAQUE, "Y - - Y - Y")
def policy_migrate_ma(case: Case) -> Verdict:
    """POLICY's MIGRATE_MA is clear.

    Attack: the host binds a migration agent that exports the guest's memory.
    """
    return _policy(case, "migrate-ma", case.profile.policy.migrate_ma)


@check(Claim.RUNTIME_OPAQUE, "Y - - Y - Y")
def policy_debug(case: Case) -> Verdict:
    """POLICY's DEBUG is clear.

    Attack: the host reads and writes all of the guest's memory by SNP_DBG_DECRYPT and SNP_DBG_ENCRYPT, keys included.
    """
    return _policy(case, "debug", case.profile.policy.debug)


@check(Claim.CONFIGURATION, "o - - o - -")
def policy_single_socket(case: Case) -> Verdict:
    """POLICY's SINGLE_SOCKET is as the profile has it.

    Attack: traffic between sockets, where a probe on the link can be placed.
    """
    return _policy(case, "single-socket", case.profile.policy.single_socket)


@check(Claim.CONFIGURATION, "o - - - - -")
def policy_cxl_allow(case: Case) -> Verdict:
    """POLICY's CXL_ALLOW is clear: the guest's memory is never on a CXL device.

    Attack: a memory device of the host's that records, replays or swaps what the guest wrote.
    """
    return _policy(case, "cxl-allow", case.profile.policy.cxl_allow)


@check(Claim.CONFIGURATION, "o - - - - -")
def policy_mem_aes_256_xts(case: Case) -> Verdict:
    """POLICY's MEM_AES_256_XTS is as the profile has it.

    Attack: memory under the shorter key and the older mode.
    """
    return _policy(case, "mem-aes-256-xts", case.profile.policy.mem_aes_256_xts)


@check(Claim.CONFIGURATION, "o - - - - Y")
def policy_rapl_dis(case: Case) -> Verdict:
    """POLICY's RAPL_DIS is as the profile has it.

    Attack: keys read from the power meters (PLATYPUS, S&P 2021; on AMD CVE-2020-12912).
    """
    return _policy(case, "rapl-dis", case.profile.policy.rapl_dis)


@check(Claim.CONFIGURATION, "o - - - - Y")
def policy_ciphertext_hiding_dram(case: Case) -> Verdict:
    """POLICY's CIPHERTEXT_HIDING_DRAM is as the profile has it.

    Attack: the host watches how the ciphertext of one address changes (CipherLeaks, USENIX Security 2021,
    CVE-2020-12966; "A Systematic Look at Ciphertext Side Channels on AMD SEV-SNP", S&P 2022).
    """
    return _policy(case, "ciphertext-hiding-dram", case.profile.policy.ciphertext_hiding_dram)


@check(Claim.CONFIGURATION, "o - - - - -")
def policy_page_swap_disable(case: Case) -> Verdict:
    """POLICY's PAGE_SWAP_DISABLE is as the profile has it.

    Attack: pages moved by the host re-encrypt known plaintext at a chosen address (Heracles, CCS 2025).
    """
    return _policy(case, "page-swap-disable", case.profile.policy.page_swap_disable)


@check(Claim.HARDWARE, "o - - - - -")
def platform_unknown_bits(case: Case) -> Verdict:
    """PLATFORM_INFO has no bit set beyond bit 7.

    Attack: a state of the platform that this verifier does not understand. Set the check to `warn` or `allow` for newer
    firmware whose new bits are understood to be harmless.
    """
    unknown = case.report.platform_info & ~_PLATFORM_KNOWN
    return (f"0x{unknown:x}", "only bits 0 to 7") if unknown else None


def _platform(case: Case, name: str, wanted: str) -> Verdict:
    return bit_verdict(case.report.platform_info, PLATFORM_BITS[name], wanted)


@check(Claim.HARDWARE, "o - - o - Y")
def platform_smt(case: Case) -> Verdict:
    """PLATFORM_INFO's SMT_EN is as the profile has it.

    Attack: a sibling thread outside the guest that watches it.
    """
    return _platform(case, "smt", case.profile.platform.smt)


@check(Claim.HARDWARE, "o - - o - -")
def platform_tsme(case: Case) -> Verdict:
    """PLATFORM_INFO's TSME_EN is as the profile has it.

    Attack: memory outside the guest's own encryption in the clear.
    """
    return _platform(case, "tsme", case.profile.platform.tsme)


@check(Claim.HARDWARE, "o - - - - -")
def platform_ecc(case: Case) -> Verdict:
    """PLATFORM_INFO's ECC_EN is as the profile has it.

    Attack: bits flipped by hammering neighbouring rows (Rowhammer).
    """
    return _platform(case, "ecc", case.profile.platform.ecc)


@check(Claim.HARDWARE, "o - - - - Y")
def platform_rapl_dis(case: Case) -> Verdict:
    """PLATFORM_INFO's RAPL_DIS is as the profile has it.

    Attack: keys read from the power meters (PLATYPUS, S&P 2021; on AMD CVE-2020-12912).
    """
    return _platform(case, "rapl-dis", case.profile.platform.rapl_dis)


@check(Claim.HARDWARE, "o - - - - Y")
def platform_ciphertext_hiding_dram(case: Case) -> Verdict:
    """PLATFORM_INFO's CIPHERTEXT_HIDING_DRAM_EN is as the profile has it.

    Attack: the host watches how ciphertext changes (CipherLeaks, CVE-2020-12966).
    """
    return _platform(case, "ciphertext-hiding-dram", case.profile.platform.ciphertext_hiding_dram)


@check(Claim.HARDWARE, "o - - - - -")
def platform_alias_check(case: Case) -> Verdict:
    """PLATFORM_INFO's ALIAS_CHECK_COMPLETE is set; `where-known` asks it only of firmware that looks.

    Attack: BadRAM (CVE-2024-21944), memory modules that lie about their size, so that two addresses reach one cell.
    """
    wanted: str = case.profile.platform.alias_check
    if wanted == "where-known":
        if case.product is None:
            return NOT_JUDGED
        report = case.report
        firmware = (report.current_major, report.current_minor, report.current_build)
        wanted = "any" if firmware < _ALIAS_CHECK_SINCE[case.product] else "set"
    return _platform(case, "alias-check", wanted)


@check(Claim.HARDWARE, "- - - - - -")
def platform_iommu_write_safe(case: Case) -> Verdict:
    """PLATFORM_INFO's bit 6 is as the profile has it.

    Attack: devices that write where the guest's integrity depends on it.
    """
    return _platform(case, "iommu-write-safe", case.profile.platform.iommu_write_safe)


@check(Claim.HARDWARE, "o - - - - -")
def platform_tio(case: Case) -> Verdict:
    """PLATFORM_INFO's TIO_EN (trusted I/O) is as the profile has it.

    Attack: devices let into the guest's memory that the relying party has no evidence of.
    """
    return _platform(case, "tio", case.profile.platform.tio)


def _implied(case: Case, policy: str, policy_set: bool, platform: str, platform_set: bool) -> Verdict:
    """The firmware launches no guest whose policy the platform does not meet: a report that says it did is odd."""
    demanded = bool(case.report.policy >> POLICY_BITS[policy] & 1) == policy_set
    met = bool(case.report.platform_info >> PLATFORM_BITS[platform] & 1) == platform_set
    if not demanded or met:
        return None
    words = {True: "set", False: "clear"}
    return (
        f"POLICY {policy} {words[policy_set]}, PLATFORM_INFO {platform} {words[not platform_set]}",
        f"PLATFORM_INFO {platform} {words[platform_set]}",
    )


@check(Claim.HARDWARE, "- - - - - Y")
def smt_consistency(case: Case) -> Verdict:
    """A guest whose POLICY forbids hyper-threads runs on a platform that has them off.

    Attack: hyper-threads switched on behind a guest that forbade them.
    """
    return _implied(case, "smt", False, "smt", False)


@check(Claim.HARDWARE, "- - - - - Y")
def rapl_consistency(case: Case) -> Verdict:
    """A guest whose POLICY forbids power meters runs on a platform that has them off.

    Attack: power meters switched on behind a guest that forbade them (PLATYPUS).
    """
    return _implied(case, "rapl-dis", True, "rapl-dis", True)


@check(Claim.HARDWARE, "- - - - - Y")
def ciphertext_hiding_consistency(case: Case) -> Verdict:
    """A guest whose POLICY demands hidden ciphertext runs on a platform that hides it.

    Attack: ciphertext shown behind a guest that forbade it (CipherLeaks).
    """
    return _implied(case, "ciphertext-hiding-dram", True, "ciphertext-hiding-dram", True)
