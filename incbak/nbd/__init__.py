"""NBD, both ends, after the protocol's own document: the wire and nothing else.

`protocol` is the format, pure, shared by both ends; requests are judged in one function there. The server: `server`
(listeners, bounds), `handshake` (negotiation), `connection` (transmission), `export` (what an export and its device owe
the server). The client: `client`, `greeting` (negotiation), `dial`, `uri`. `wire` reads and writes whole messages with
a deadline; `tls` is for both ends, beside the path of a plain connection. `replies` has the server's replies in each
of the three dialects: simple, structured, and extended headers with lengths of 64 bits (the protocol's branch
``extension-ext-header``), which our client asks for first and does without.

What the server guarantees: no memory by a length that the client chose beyond the advertised maximum; a refused
payload is drained; nothing is opened before negotiation is over, and that has bounds in time, options and bytes; a few
slow requests hold up no fast one, nor one client another; who does not read replies is dropped; connections are capped;
a Unix socket is private before its name appears; names are keys, never paths (faults rows 63 to 75). With TLS, nothing
but ABORT is answered on TCP before it, nothing that was agreed on or sent before it counts, and its handshake is within
the same deadline.

What the client guarantees: a reply that was not asked for, is cut short, too long or does not fit ends in an
`NbdProtocolError`, in bounded time and memory; the extents of a block status tile what was asked; the error of a
request in flight is raised by a later call, never swallowed (row 72, L11). Who wants TLS never goes on without.
"""
