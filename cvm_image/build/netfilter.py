"""The guest's packet filter: everything is dropped, in and out, but the recipe's ports."""

from __future__ import annotations

from cvm_image.build.recipe import Network

RULES_FILE = "etc/sealwright/nftables.conf"
_NFS_SET = """  set nfs_server {
    type ipv4_addr
    size 1
  }
"""
_NFS_RULE = "    ip daddr @nfs_server tcp dport 2049 ct state new accept\n"


def packet_filter(network: Network) -> str:
    """Return the nftables rules: default-deny in every direction, connections that were allowed go on.

    Besides the ports, DHCP may ask for an address; nothing else of the network is spoken to, name servers included.
    With `nfs`, process 1 puts the one server that the init-data name into an empty set.
    """
    nfs_set, nfs_rule = (_NFS_SET, _NFS_RULE) if network.nfs else ("", "")
    inbound = _ports(network.inbound)
    outbound = _ports(network.outbound)
    return f"""flush ruleset
table inet sealwright {{
{nfs_set}  chain input {{
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
    udp sport 67 udp dport 68 accept
{inbound and f"    tcp dport {inbound} ct state new accept"}
  }}
  chain forward {{
    type filter hook forward priority 0; policy drop;
  }}
  chain output {{
    type filter hook output priority 0; policy drop;
    oif lo accept
    ct state established,related accept
    udp sport 68 udp dport 67 accept
{outbound and f"    tcp dport {outbound} ct state new accept"}
{nfs_rule}  }}
}}
"""


def _ports(ports: tuple[int, ...]) -> str:
    return "{ " + ", ".join(str(port) for port in sorted(set(ports))) + " }" if ports else ""
