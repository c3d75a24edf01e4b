import os,sys
m=sys.argv[1]
os.chdir(m)
def w(p,b):
    with open(p,'wb') as f: f.write(b)
for n in (0,1,100,3000,3864,3865,4096,100000,1048576,3*1048576):
    w('f%d'%n, bytes((i*7+n)&0xff for i in range(256))*(n//256)+b'x'*(n%256))
os.makedirs('d1/d2/d3/d4')
w('d1/d2/d3/d4/leaf',b'deep')
os.mkdir('big')
N=int(sys.argv[2])
for i in range(N): w('big/file-number-%05d'%i,b'')
os.mkdir('chain')
os.symlink('/some/target','sym'); os.symlink('x'*2000,'longsym')
os.link('f100','d1/hard')
os.mkfifo('fifo'); os.mknod('null',0o20666,os.makedev(1,3))
with open('sparse','wb') as f:
    f.seek(50*1048576); f.write(b'end')
os.setxattr('f100','user.small',b'v1'); os.setxattr('f100','user.big',b'B'*3000)
os.setxattr('d1','user.dir',b'dd')
for i in range(40): os.setxattr('f3000','user.attr%03d'%i,(b'%d-'%i)*60)
os.setxattr('f1','trusted.t',b'tr'); os.setxattr('f1','user.huge',b'H'*20000)
for i in range(20): os.unlink('big/file-number-%05d'%(i*3))
os.rename('big/file-number-00001','d1/moved')
