package api

// Paths of /v1. {x} is one path segment, escaped.
//
//	GET    /v1/status                     Status
//	POST   /v1/init            Init       Done       only before the node is a member
//	POST   /v1/join            Join       Done       only before the node is a member
//	POST   /v1/leave           Leave      Done
//	GET    /v1/tokens                     List[Token]
//	POST   /v1/tokens          TokenCreate Token
//	DELETE /v1/tokens/{id}                Done
//	GET    /v1/nodes                      List[Node]
//	GET    /v1/nodes/{name}               Node
//	DELETE /v1/nodes/{name}               Done       a node that left or is fenced
//	GET    /v1/quorum                     Quorum
//	GET    /v1/volumes                    List[Volume]
//	POST   /v1/volumes         VolumeCreate Volume   answered when the copy is made
//	GET    /v1/volumes/{name}             Volume
//	DELETE /v1/volumes/{name}             Done
//	POST   /v1/volumes/{name}/scrub VolumeScrub Done
//	GET    /v1/targets                    List[Target]
//	POST   /v1/targets         TargetCreate Target
//	GET    /v1/targets/{iqn}              Target
//	DELETE /v1/targets/{iqn}              Done
//	GET    /v1/luns                       List[LUN]
//	POST   /v1/luns            LUNCreate  LUN
//	DELETE /v1/luns/{iqn}/{n}             Done
//	POST   /v1/acls            ACLChange  Target
//	GET    /v1/portals                    List[Portal]
//	POST   /v1/portals         PortalAdd  Portal
//	DELETE /v1/portals/{node}/{address}   Done       node "-": the one that is asked
//	GET    /v1/sessions                   List[Session]
//	GET    /v1/stats                      Stats      every storage node is asked; ?node=NAME: only that one
//	GET    /v1/reservations               List[Reservation]
//	DELETE /v1/sessions/{node}/{tsih}     Done       the initiator may log in again
//	POST   /v1/targets/{iqn}   TargetSet  Target
//	POST   /v1/luns/{iqn}/{n}  LUNSet     LUN
//	GET    /v1/accounts                   List[Account]
//	POST   /v1/accounts        AccountCreate Account
//	DELETE /v1/accounts/{name}            Done       ?force=1: although a target then asks for nothing
//	POST   /v1/bindings        AccountBind Account
//	GET    /v1/fence                      List[Fence]
//	GET    /v1/fence/history              List[FenceEvent]
//	POST   /v1/fence/ack       FenceAck   Done
//	GET    /v1/fence/devices              List[FenceDevice]
//	POST   /v1/fence/devices   FenceDeviceSet FenceDevice
//	DELETE /v1/fence/devices/{name}       Done
//	GET    /v1/fence/methods              List[FenceMethods]
//	POST   /v1/fence/methods   FenceMethods FenceMethods
//	POST   /v1/fence/run       FenceRun   Done
//	POST   /v1/fence/test      FenceTest  FenceTested
//	GET    /v1/events                     server-sent events, data: Event: those the
//	                                      node still remembers, then new ones;
//	                                      ?follow=0 ends after the remembered ones
//	GET    /metrics /healthz /readyz
const (
	PathStatus       = "/v1/status"
	PathInit         = "/v1/init"
	PathJoin         = "/v1/join"
	PathLeave        = "/v1/leave"
	PathTokens       = "/v1/tokens"
	PathNodes        = "/v1/nodes"
	PathQuorum       = "/v1/quorum"
	PathVolumes      = "/v1/volumes"
	PathTargets      = "/v1/targets"
	PathLUNs         = "/v1/luns"
	PathACLs         = "/v1/acls"
	PathPortals      = "/v1/portals"
	PathSessions     = "/v1/sessions"
	PathStats        = "/v1/stats"
	PathReservations = "/v1/reservations"
	PathAccounts     = "/v1/accounts"
	PathBindings     = "/v1/bindings"
	PathFence        = "/v1/fence"
	PathFenceHistory = "/v1/fence/history"
	PathFenceAck     = "/v1/fence/ack"
	PathFenceDevices = "/v1/fence/devices"
	PathFenceMethods = "/v1/fence/methods"
	PathFenceRun     = "/v1/fence/run"
	PathFenceTest    = "/v1/fence/test"
	PathEvents       = "/v1/events"
)
