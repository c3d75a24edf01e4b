 Member Name                             ID   Status
 ------ ----                             ---- ------
 n3                                          3 Online, Local
